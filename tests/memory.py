"Memory of programs that tests start"

PEAK = '''
def peak(): # [KiB] of this program alone; getrusage would tell the parent's if that is larger
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
'''

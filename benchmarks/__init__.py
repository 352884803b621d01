"Speed against references: python -m benchmarks FAMILY"

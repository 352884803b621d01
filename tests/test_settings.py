"""settings.ini is the one source of metadata; what repeats it must agree."""
import re
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import medvol_nb

ROOT = Path(__file__).resolve().parents[1]
PARSER = ConfigParser(delimiters=["="], interpolation=None)
PARSER.read(ROOT/"settings.ini", encoding="utf-8")
SETTINGS = PARSER["DEFAULT"]
PYPROJECT = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))
GROUPS = [k for k in SETTINGS if k == "requirements" or k.endswith("_requirements")]
REQUIREMENTS = sorted({r for g in GROUPS for r in SETTINGS[g].split()})
BUILT_IN_MARKERS = {"parametrize", "skip", "skipif", "xfail", "usefixtures", "filterwarnings", "timeout", "xdist_group"}


@pytest.mark.parametrize("key", ["lib_path", "nbs_path", "doc_path", "tst_flags", "branch"])
def test_both_nbdev_tables_agree(key): assert PYPROJECT["tool"]["nbdev"][key] == SETTINGS[key]


def test_nbdev_rewrites_nothing():
    assert PYPROJECT["tool"]["nbdev"]["update_pyproject"] is False and SETTINGS["update_pyproject"] == "False"


def test_version_has_one_source():
    assert medvol_nb.__version__ == SETTINGS["version"] == str(Version(SETTINGS["version"]))
    assert "project" not in PYPROJECT, "metadata lives in settings.ini"


def test_python_floor_is_the_linters_target():
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + SETTINGS["min_python"].replace(".", "")


@pytest.mark.parametrize("group", GROUPS)
def test_requirements_are_readable(group):
    assert "%" not in SETTINGS[group], "a percent sign would be interpolated by other readers of the file"
    names = []
    for word in SETTINGS[group].split():
        requirement = Requirement(word)  # a space inside a requirement would leave a word such as '<3'
        names.append(canonicalize_name(requirement.name))
        assert requirement.url is None and requirement.marker is None
    assert len(set(names)) == len(names), f"{group} names a package twice"


def test_torch_has_an_upper_bound():
    torch = [Requirement(r) for r in REQUIREMENTS if Requirement(r).name == "torch"]
    assert torch and all(any(s.operator in ("<", "<=", "==", "~=") for s in r.specifier) for r in torch)


def test_torchvision_stays_out():
    assert not [r for r in REQUIREMENTS if canonicalize_name(Requirement(r).name) in ("torchvision", "timm", "lpips")]


def test_command_is_declared():
    command, target = re.fullmatch(r"(\S+)\s*=\s*(\S+)", SETTINGS["console_scripts"].strip()).groups()
    module, _, function = target.partition(":")
    assert command == "medvol" and function
    path = ROOT/(module.replace(".", "/") + ".py")
    assert re.search(rf"(?m)^(def {function}\b|{function}\s*=)", path.read_text(encoding="utf-8"))


def test_constraints_lie_within_the_ranges():
    file = ROOT/"constraints.txt"
    pins = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if not (line := line.split("#")[0].strip()): continue
        requirement = Requirement(line)
        pins[canonicalize_name(requirement.name)] = requirement
    outside = []
    for requirement in map(Requirement, REQUIREMENTS):
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None: continue
        for s in pin.specifier:
            if s.operator == "==" and not requirement.specifier.contains(s.version.split("+")[0], prereleases=True):
                outside.append(f"{pin} is not in {requirement}")
    assert not outside, "\n".join(outside)
    missing = [r for r in REQUIREMENTS if canonicalize_name(Requirement(r).name) not in pins]
    assert not missing, f"constraints.txt does not pin {missing}"


def test_markers_are_registered():
    registered = {m.split(":")[0].strip() for m in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    used = {m for p in (ROOT/"tests").rglob("*.py")
            for m in re.findall(r"pytest\.mark\.(\w+)", p.read_text(encoding="utf-8"))} - BUILT_IN_MARKERS
    assert used <= registered, f"register {sorted(used - registered)} in pyproject.toml"
    assert {"slow", "gpu", "net", "browser", "diffusion", "realdata"} <= registered
    assert "--strict-markers" in PYPROJECT["tool"]["pytest"]["ini_options"]["addopts"]

"""Recording of constructor arguments, and rebuilding from plain data."""

import copy
import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from mmpt.config import Configurable, from_config, packages, to_config
from mmpt.errors import ConfigError, UntrustedClassError
from mmpt.masking import Exact, MaskingPolicy, Span, Uniform

HERE = __name__
TRUST = [HERE]


class Base(Configurable):
    def __init__(self, size: int, *, colour: str = "red") -> None:
        self.size, self.colour = size, colour


class Derived(Base):
    def __init__(self, extra: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = extra


class Fixed(Base):
    def __init__(self) -> None:
        super().__init__(7, colour="blue")


class Inheriting(Base):
    pass


class Module(nn.Module, Configurable):
    def __init__(self, part: nn.Module | None = None, width: int = 3) -> None:
        super().__init__()
        self.part = part
        self.linear = nn.Linear(width, width)


class Bare(nn.Module, Configurable):
    pass


class Positional(Configurable):
    def __init__(self, *parts: int, last: int = 0) -> None:
        self.parts, self.last = parts, last


@dataclass
class Generated(Configurable):
    size: int = 1


def rebuilt(thing: Configurable) -> Any:
    config = yaml.safe_load(yaml.safe_dump(thing.config()))
    return from_config(config, trust=TRUST)


def test_positional_keyword_and_default_arguments_are_recorded():
    assert Base(3).config()["init_args"] == {"size": 3, "colour": "red"}
    assert Base(size=3, colour="green").config()["init_args"] == {"size": 3, "colour": "green"}


def test_only_the_outermost_constructor_is_recorded():
    assert Derived(0.5, size=2).config()["init_args"] == {"extra": 0.5, "size": 2}
    assert Fixed().config()["init_args"] == {}
    assert Inheriting(4).config() == {"class_path": f"{HERE}.Inheriting", "init_args": {"size": 4, "colour": "red"}}


def test_rebuilding_gives_the_same_objects():
    thing = rebuilt(Derived(0.5, size=2, colour="green"))
    assert isinstance(thing, Derived)
    assert (thing.extra, thing.size, thing.colour) == (0.5, 2, "green")
    assert rebuilt(Fixed()).size == 7
    module = rebuilt(Module(Module(None, 5), 4))
    assert (module.linear.in_features, module.part.linear.in_features) == (4, 5)


def test_rebuilding_is_a_fixed_point():
    policy = Exact(0.6, mask=1.0, random=0.0)
    assert rebuilt(policy).config() == policy.config()


def test_modules_without_arguments_of_their_own_have_none():
    bare: Any = Bare()
    assert bare.config() == {"class_path": f"{HERE}.Bare", "init_args": {}}
    assert isinstance(rebuilt(Bare()), Bare)


def test_a_recorded_module_can_be_copied():
    module: Any = Module(Module(None, 5), 4)
    twin = copy.deepcopy(module)
    assert twin.config() == module.config()
    assert twin.part is not module.part
    assert twin._init_args["part"] is twin.part
    assert len(list(module.parameters())) == 4


def test_unnamed_further_arguments_are_refused_because_they_could_not_be_written():
    assert Positional(last=2).config()["init_args"] == {"last": 2}
    with pytest.raises(ConfigError, match=r"\*parts"):
        Positional(1, 2)


def test_a_constructor_that_can_not_be_recorded_is_refused_when_writing():
    with pytest.raises(ConfigError, match="not recorded"):
        Generated(5).config()


def test_wrong_arguments_are_an_error_of_the_constructor():
    with pytest.raises(TypeError):
        Base()  # type: ignore[call-arg]


class Shade(enum.StrEnum):
    DARK = "dark"


def test_subclasses_of_plain_values_become_plain():
    config = to_config([np.float64(0.5), Shade.DARK, True, None, Path("a/b"), (1, 2), {"k": 1.5}])
    assert yaml.safe_load(yaml.safe_dump(config)) == [0.5, "dark", True, None, "a/b", [1, 2], {"k": 1.5}]
    assert [type(item) for item in config[:3]] == [float, str, bool]


def test_other_values_are_refused():
    with pytest.raises(ConfigError, match="Linear"):
        to_config({"part": nn.Linear(2, 2)})


def test_folder_is_replaced_only_when_given():
    assert from_config({"a": ["${folder}/x"]}, folder=Path("/f")) == {"a": ["/f/x"]}
    assert from_config("${folder}/x") == "${folder}/x"


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.Popen", "mmptx.Thing", "mmpt", "torch.nn.Linear", f"{HERE}.Base", 5]
)
def test_classes_outside_mmpt_are_refused_unless_trusted(path):
    with pytest.raises(UntrustedClassError, match="trust"):
        from_config({"class_path": path, "init_args": {}})


@pytest.mark.parametrize("path", ["mmpt.config.import_module", "mmpt.masking.torch", "mmpt.encoder.Tokens"])
def test_only_configurable_classes_are_built(path):
    with pytest.raises(ConfigError):
        from_config({"class_path": path, "init_args": {"name": "os"}})


def test_untrusted_classes_deep_in_the_tree_are_refused():
    config = {"class_path": f"{HERE}.Module", "init_args": {"part": {"class_path": "os.path.join"}}}
    with pytest.raises(UntrustedClassError, match=r"os\.path"):
        from_config(config, trust=TRUST)


def test_unknown_classes_and_arguments_are_named():
    with pytest.raises(ConfigError, match=r"mmpt\.masking\.Nothing"):
        from_config({"class_path": "mmpt.masking.Nothing"})
    with pytest.raises(ConfigError, match="colour"):
        from_config({"class_path": "mmpt.masking.Uniform", "init_args": {"colour": 1}})


def test_packages_of_a_configuration():
    config = {"a": [{"class_path": "x.y.Z", "init_args": {"b": {"class_path": "mmpt.masking.Span"}}}], "c": 3}
    assert packages(config) == {"x", "mmpt"}


def test_command_line_sees_the_signature_of_a_recorded_class():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MaskingPolicy, "policy")
    config = parser.parse_args(["--policy=mmpt.masking.Span", "--policy.mean_length=2.5", "--policy.rate=0.3"])
    policy = parser.instantiate(config).policy
    assert isinstance(policy, Span)
    assert (policy.mean_length, policy.rate, policy.max_length) == (2.5, 0.3, 10)
    assert rebuilt(policy).config() == policy.config()


def test_policies_compare_by_configuration():
    assert Uniform(0.2).config() != Uniform(0.3).config()

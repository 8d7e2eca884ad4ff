"""Prints the constraints that hold what this package needs down to the oldest version of each range."""

from importlib.metadata import requires

from packaging.requirements import Requirement

EXTRAS = ("train", "fast", "quantization")

for requirement in map(Requirement, requires("feedback_transformers") or ()):
    wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS)
    for specifier in requirement.specifier:
        if wanted and specifier.operator == ">=":
            print(f"{requirement.name}=={specifier.version}")

"""An extension of griffe that makes the fields of a config its parameters: the reference then shows their defaults."""

from __future__ import annotations

from typing import Any

from griffe import Class, Extension, Function, Parameter, ParameterKind, Parameters


class ConfigFields(Extension):
    """Give classes decorated with huggingface_hub's `strict` an `__init__`, as griffe does for dataclasses."""

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        if not any(str(decorator.value) == "strict" for decorator in cls.decorators):
            return
        fields = [
            Parameter(name, annotation=each.annotation, kind=ParameterKind.keyword_only, default=each.value)
            for name, each in cls.attributes.items()
            if each.annotation is not None and "instance-attribute" in each.labels
        ]
        init = Function("__init__", parameters=Parameters(Parameter("self"), *fields), parent=cls)
        cls.set_member("__init__", init)

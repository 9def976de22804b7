"""The parameters of the remasking strategies as arguments of the trainers, and with them of the command line."""

from dataclasses import Field, field, make_dataclass

from ..generation.samplers import parameters


def _argument(parameter: Field) -> tuple[str, type, Field]:
    text = f"{parameter.metadata.get('help', '')} `None` takes the checkpoint's, else {parameter.default}.".lstrip()
    return parameter.name, type(parameter.default) | None, field(default=None, metadata={"help": text})


StrategyArguments = make_dataclass(
    "StrategyArguments",
    [_argument(parameter) for parameter in parameters().values()],
    namespace={"__module__": __name__},
)

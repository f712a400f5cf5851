"""Block types of single tensors of a GGUF file, as llama-quantize's options name them: rules behind those of a recipe."""

import re
from dataclasses import dataclass, replace

from bitwright.errors import RecipeError, one_of
from bitwright.formats.ggml import TYPES
from bitwright.gguf.file_types import FLOAT_TYPES, MIXES
from bitwright.plan.recipe import EMBEDDING, HEAD, Recipe
from bitwright.plan.recipe_file import transform_of
from bitwright.plan.rule import Rule
from bitwright.transforms import Transform, split_method


@dataclass(frozen=True)
class TensorTypes:
    """The options --tensor-type, --output-tensor-type and --token-embedding-type.

    named      "NAME=TYPE", NAME a regular expression; of several that match a tensor the first wins
    head       the output head's block type, or that of an embedding which is the head too; embedding: the embedding's
    """

    named: tuple[str, ...] = ()
    head: str | None = None
    embedding: str | None = None

    @property
    def options(self) -> dict[str, object]:
        """The options by name, as the command line has them."""
        return {
            "--tensor-type": self.named,
            "--output-tensor-type": self.head,
            "--token-embedding-type": self.embedding,
        }

    def added_to(self, recipe: Recipe, method: str, format: str, *, one_file: bool) -> Recipe:
        """The recipe with a rule for each. one_file: whether the format is GGUF.

        RecipeError for another format, another form than NAME=TYPE, and what is no block type.
        """
        if not any(self.options.values()):
            return recipe
        if not one_file:
            message = f"types of single tensors are GGUF's, and OUT is {format}"
            remedy = "name OUT.gguf, or give rules in a recipe"
            raise RecipeError(message, where="--tensor-type", remedy=remedy)
        before, plain = split_method(method)
        transforms = tuple(transform_of(item, "") for item in before)
        rules = [
            _rule(*_name_and_type(text), plain, transforms, "--tensor-type", regex=True)
            for text in reversed(self.named)
        ]
        for name, kind, option in (
            (HEAD, self.head, "--output-tensor-type"),
            (EMBEDDING, self.embedding, "--token-embedding-type"),
        ):
            if kind is not None:
                rules.append(_rule(name, kind, plain, transforms, option, regex=False))
        return replace(recipe, rules=(*recipe.rules, *rules))


NO_TYPES = TensorTypes()


def _name_and_type(text: str) -> tuple[str, str]:
    """The parts of NAME=TYPE, NAME in lower case as llama-quantize takes it. RecipeError for another form."""
    name, found, kind = text.rpartition("=")
    if not found or not name or not kind:
        remedy = "--tensor-type attn_v=q6_k"
        raise RecipeError(f"tensor type {text!r} is not of the form NAME=TYPE", where="--tensor-type", remedy=remedy)
    try:
        re.compile(name.lower())
    except re.error as error:
        remedy = r"such as --tensor-type 'blk\.[0-3]\.ffn_down=q6_k'"
        message = f"{name!r} is no regular expression: {error}"
        raise RecipeError(message, where="--tensor-type", remedy=remedy) from error
    return name.lower(), kind


def _rule(match: str, kind: str, method: str, transforms: tuple[Transform, ...], option: str, *, regex: bool) -> Rule:
    """The rule that gives matching tensors one block type, or a float type. RecipeError for what is none."""
    name = kind.upper()
    if name not in (*TYPES, *FLOAT_TYPES):
        what = "is a mix of block types" if name in MIXES else "is no block type"
        remedy = one_of(kind, [known.lower() for known in (*TYPES, *FLOAT_TYPES)])
        raise RecipeError(f"{kind!r} {what}", where=option, remedy=remedy)
    scheme = None if name in FLOAT_TYPES else TYPES[name].scheme
    return Rule(match, scheme, method, transforms=transforms if scheme else (), mix=name, exact=True, regex=regex)

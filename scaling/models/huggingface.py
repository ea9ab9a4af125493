"""Modules of the transformers library, by their config.json: causal language models, and encoders for a vla."""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from scaling.errors import CheckpointError, UserError
from scaling.inventory import CHANNELS
from scaling.models.initial import has_weights, local_folder
from scaling.spec.sections import HuggingFace, HuggingFaceLanguage, HuggingFaceVision

logger = logging.getLogger("scaling")

REMOTE_CODE = "transformers_modules"
"""The package as which transformers imports code that a model's folder brings along."""
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
PLAIN = (0.5,) * CHANNELS
"""Mean and deviation of pixels from 0 to 1, where a folder does not say them: they are from -1 to 1 then."""


def causal_lm(model: HuggingFace, allow_import: Sequence[str], *, filled: bool) -> nn.Module:
    """The module, from its config.json alone, on torch's default device; with initial values only where `filled`.
    UserError where it cannot be built."""
    with _told("model", model.path, "a causal language model"):
        from transformers import AutoModelForCausalLM

        config = _config_in(local_folder(model.path, "model.path"), allow_import)
        config.use_cache = False  # of generation
        trusted, dtype = REMOTE_CODE in allow_import, torch.get_default_dtype()
        with _initial_values(filled):
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted, dtype=dtype)
        module.tie_weights()
        return module


class VisionEncoder(nn.Module):
    """Views to tokens by a model of transformers, which sees each by itself."""

    def __init__(self, model: nn.Module, width: int, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.width = width
        self._scale = tuple(zip(mean, deviation, strict=True))
        self._owner, _, self._first = next(name for name, _ in model.named_parameters()).rpartition(".")

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [batch, views, height, width, 3] -> [batch, tokens of all views, hidden]."""
        channels = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        pixels = torch.stack([(channels[:, at] - mean) / wide for at, (mean, wide) in enumerate(self._scale)], dim=1)
        # As it is read: not every model brings its input to the type that it computes in.
        dtype = getattr(self.model.get_submodule(self._owner), self._first).dtype
        seen = self.model(pixel_values=pixels.to(dtype)).last_hidden_state
        if seen.dim() == 4:  # a map of features
            seen = seen.flatten(2).transpose(1, 2)
        return seen.unflatten(0, (len(images), -1)).flatten(1, 2)


class LanguageEncoder(nn.Module):
    """An instruction to tokens by a model of transformers."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model = model
        self.width = width

    def forward(self, instruction: Tensor) -> Tensor:
        """int64 [batch, tokens] -> [batch, tokens, hidden]."""
        return self.model(input_ids=instruction).last_hidden_state


class Encoder:
    """A part of a vla that is a model of transformers: how to build it, and what it starts from."""

    def __init__(
        self, part: str, spec: HuggingFaceVision | HuggingFaceLanguage, allow_import: Sequence[str], seed: int = 0
    ) -> None:
        """`part`: "vision" or "language". `seed`: of its initial values where its folder has none."""
        self.part, self.spec = part, spec
        self._allow_import, self._seed = allow_import, seed

    @property
    def words(self) -> int:
        """Token ids that a language knows."""
        with self._told():
            return self._config.vocab_size

    def look(self) -> None:
        """Find out what is read of it. UserError where it cannot be built."""
        _ = self._found

    def build(self) -> VisionEncoder | LanguageEncoder:
        """On torch's default device, without values. UserError where it cannot be built."""
        return self._around(self._bare(filled=False))

    @cached_property
    def parameters(self) -> Mapping[str, Tensor]:
        """Initial values by their names in the vla, fp32 on the host. CheckpointError where its folder lacks some."""
        return {f"{self.part}.{name}": value.detach() for name, value in self._loaded.named_parameters()}

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """The same of its buffers."""
        return {f"{self.part}.{name}": value for name, value in self._loaded.named_buffers()}

    def described(self) -> str:
        """What of its folder, beside the weights, decides what it computes."""
        files = [self._folder / name for name in (CONFIG, PREPROCESSOR)]
        return "\n".join(file.read_text("utf-8") for file in files if file.is_file())

    @cached_property
    def _folder(self) -> Path:
        return local_folder(self.spec.path, f"model.{self.part}.path")

    @cached_property
    def _config(self) -> Any:
        """Of the half that is wanted, where it is a model of images and texts."""
        with self._told():
            whole = _config_in(self._folder, self._allow_import)
            half = "vision_config" if self.part == "vision" else "text_config"
            found = getattr(whole, half, None) or whole
            found.use_cache = False  # of generation
            return found

    def _told(self) -> AbstractContextManager[None]:
        what = "an image model" if self.part == "vision" else "a language model"
        return _told(f"model.{self.part}", self.spec.path, what)

    def _bare(self, *, filled: bool) -> nn.Module:
        with self._told(), _initial_values(filled):
            from transformers import AutoModel

            trusted = REMOTE_CODE in self._allow_import
            return _half(
                AutoModel.from_config(self._config, trust_remote_code=trusted, dtype=torch.get_default_dtype())
            )

    def _around(self, model: nn.Module) -> VisionEncoder | LanguageEncoder:
        """Without what is never read."""
        never, width = self._found
        found = self._whole(model, width)
        _leave_out(found, "", never)
        return found

    def _whole(self, model: nn.Module, width: int) -> VisionEncoder | LanguageEncoder:
        if self.part == "language":
            return LanguageEncoder(model, width)
        try:
            said = json.loads((self._folder / PREPROCESSOR).read_text("utf-8"))
        except FileNotFoundError:
            said = {}
        except (OSError, ValueError) as error:
            raise UserError(
                f"`model.vision.path` must have a {PREPROCESSOR} that can be read, or none, but that of {self._folder} "
                f"cannot: {error}; correct it"
            ) from None
        return VisionEncoder(model, width, said.get("image_mean") or PLAIN, said.get("image_std") or PLAIN)

    @cached_property
    def _found(self) -> tuple[frozenset[str], int]:
        """Parameters that no gradient reaches, such as a pooler's, which no step would ever read; and the width."""
        # Shapes alone; whoever else is looking at what is computed here is not meant. On the device "meta" what asks
        # for a value fails, which transformers asks for where tensors do not say that they are fake.
        with _disable_current_modes(), FakeTensorMode(), torch.device("cpu"), torch.enable_grad(), self._told():
            found = self._whole(self._bare(filled=False), 0)
            if isinstance(self.spec, HuggingFaceVision):
                given = torch.zeros(1, 1, self.spec.image_size, self.spec.image_size, CHANNELS, dtype=torch.uint8)
            else:
                given = torch.zeros(1, 2, dtype=torch.int64)
            seen = found(given)
            seen.float().sum().backward()
        never = frozenset(name for name, parameter in found.named_parameters() if parameter.grad is None)
        return never, seen.shape[-1]

    @cached_property
    def _loaded(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(self._seed)
            lacking: set[int] = set()
            if has_weights(self._folder):
                model, lacking = self._from_files()
            else:
                logger.info(f"{self.part} starts from transformers' own initial values: {self._folder} has no weights")
                model = self._bare(filled=True).float()
            found = self._around(model)
        for name, parameter in found.named_parameters():
            if id(parameter) in lacking:
                raise CheckpointError(
                    f"the weights in {self._folder} must have {name.removeprefix('model.')}, but have no such tensor; "
                    "fetch them again, or correct its config.json"
                )
        return found

    def _from_files(self) -> tuple[nn.Module, set[int]]:
        """The module, and what of its parameters is in no file."""
        from transformers import AutoModel

        logger.info(f"weights of {self.part} from {self._folder}")
        try:
            model, about = AutoModel.from_pretrained(
                self._folder,
                config=self._config,
                local_files_only=True,
                trust_remote_code=REMOTE_CODE in self._allow_import,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # what safetensors raises for a file that is cut short is its own
            raise CheckpointError(
                f"the weights in {self._folder} must be whole, and of its config.json's model, but are not: "
                f"{_first_line(error)}; fetch them again"
            ) from error
        missing = set(about["missing_keys"])
        lacking = {id(parameter) for name, parameter in model.named_parameters() if name in missing}
        return _half(model), lacking


class _NeverRead(nn.Module):
    """In the place of a module whose result is not read."""

    def forward(self, *given: Any, **_: Any) -> Any:
        """The first that it is given, whatever that is."""
        return given[0] if given else None


def _leave_out(module: nn.Module, path: str, names: Collection[str]) -> None:
    """Parameters of these names; with modules that have nothing else."""
    for name in [name for name in module._parameters if path + name in names]:
        setattr(module, name, None)
    for name, inner in list(module.named_children()):
        own = [f"{path}{name}.{parameter}" for parameter, _ in inner.named_parameters()]
        if own and all(one in names for one in own):
            setattr(module, name, _NeverRead())
        else:
            _leave_out(inner, f"{path}{name}.", names)


def _half(model: nn.Module) -> nn.Module:
    """Of an encoder and a decoder the encoder."""
    config: Any = model.config
    return model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model  # pyright: ignore


def _config_in(folder: Path, allow_import: Sequence[str]) -> Any:
    from transformers import AutoConfig

    trusted = REMOTE_CODE in allow_import
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)


def _initial_values(wanted: bool) -> AbstractContextManager[Any]:
    from transformers.initialization import no_init_weights

    return nullcontext() if wanted else no_init_weights()  # which would look into what ZeRO-3 has cut already


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


@contextmanager
def _told(field: str, path: str, what: str) -> Iterator[None]:
    """UserError in place of what goes wrong where transformers makes `what` of a config.json."""
    try:
        from transformers.utils import logging as messages
    except ImportError as error:
        raise UserError(
            f'`{field}.kind` must be another where transformers is not installed ({error}), but is "huggingface"; '
            "`pip install 'scaling[huggingface]'`"
        ) from None
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"`{field}.path` must be a model whose code transformers has itself, but {path[:200]!r} brings its own "
                f"along (auto_map in its config.json); if you trust it, pass --allow-import {REMOTE_CODE}"
            ) from None
        raise UserError(
            f"`{field}.path` must be a folder whose config.json transformers builds {what} of, but {path[:200]!r} is "
            f"not: {_first_line(error)}"
        ) from None

"""Opening, saving and publishing, which all pipelines have in common."""

import inspect
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from .components import is_of
from .hub_download import OPTIONS, fetch
from .portable import PACKAGE, add_code, use_imported

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as Base
else:
    Base = object  # diffusers takes every pipeline class that a file has for the one to open


class HubMixin(Base):
    """A pipeline that opens from the Hub without its code being run, and carries its code for those without hfdiff."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a pipeline from a local folder, or from a Hub id at a `revision` if one is given.

        Takes the arguments of `DiffusionPipeline.from_pretrained`. Differs from diffusers, which asks for
        `trust_remote_code` where a folder carries code: the classes of this package are used instead of it. The files
        of a Hub repository are downloaded first, checked, then loaded as a folder. Weights are copied out of the mapped
        file, so every process on a machine computes the same bits with them.

        Raises:
            ValueError: for a name that is neither a folder nor a Hub id, or a `variant` that is not there.
            OSError: when the pipeline cannot be had or is damaged, in one sentence.
        """
        name, folder = str(pretrained_model_name_or_path), pretrained_model_name_or_path
        if not os.path.isdir(folder):
            options = {option: kwargs.pop(option) for option in OPTIONS if option in kwargs}
            code = kwargs.get("trust_remote_code", False)
            folder = fetch(name, variant=kwargs.get("variant"), code=code, **options)
        pipe = super().from_pretrained(folder, **kwargs)
        pipe.register_to_config(_name_or_path=name)
        own_memory(pipe)
        return pipe

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The content of `model_index.json`, with this package's classes in place of the folder's code."""
        config = super().load_config(*args, **kwargs)
        return (use_imported(config[0]), *config[1:]) if isinstance(config, tuple) else use_imported(config)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves a folder that opens with hfdiff, and with diffusers alone by `trust_remote_code=True`.

        Args:
            save_directory: the folder.
            safe_serialization: as safetensors, not as pickles.
            variant: of the weights' file names, like "fp16".
            max_shard_size: of a file of weights, in bytes or like "5GB".
            push_to_hub: publish it, too, as `repo_id`, by default the folder's name.
            kwargs: those of `push_to_hub`.
        """
        self._check_savable()
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size)
        add_code(save_directory, type(self))
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repo_id, variant=variant, **kwargs)

    def _check_savable(self) -> None:
        """Refuses components that would be left out of a folder, or could not be opened from it.

        Raises:
            ValueError: for the first of them.
        """
        for name, module in self.components.items():
            original = getattr(module, "_orig_mod", module)  # what `torch.compile` wraps
            if not isinstance(original, nn.Module):
                continue
            unsaved = getattr(original, "unsaved", None)  # what a component says of itself
            if unsaved:
                raise ValueError(
                    f"`{name}` cannot be saved, got {unsaved}; make it a diffusers.ModelMixin with a config."
                )
            adapters = getattr(original, "_hf_peft_config_loaded", False) or is_of(original, "peft")
            if adapters or not (is_of(original, "diffusers") or is_of(original, "transformers")):
                remedy = "merge its adapters first" if adapters else "make it a diffusers.ModelMixin with a config"
                raise ValueError(
                    f"`{name}` cannot be saved, got {type(original).__name__}"
                    f"{' with adapters that are not merged' if adapters else ''}; {remedy}."
                )

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> Any:
        """A pipeline of another one's components and settings, without a copy of the weights.

        Args:
            pipeline: any that has the components, like diffusers' DDPMPipeline.
            components: those to take instead, or that it lacks, like `classifier`.

        Raises:
            ValueError: when one is missing.
        """
        wanted = list(inspect.signature(cls.__init__).parameters.values())[1:]
        found = {parameter.name: None for parameter in wanted if parameter.name in cls._optional_components}
        found |= {p.name: pipeline.config[p.name] for p in wanted if p.default is None and p.name in pipeline.config}
        found |= {name: part for name, part in pipeline.components.items() if name in {p.name for p in wanted}}
        missing = [p.name for p in wanted if p.default is p.empty and p.name not in {**found, **components}]
        if missing:
            raise ValueError(
                f"`pipeline` must have {', '.join(missing)}, got a {type(pipeline).__name__}; give `{missing[0]}=`."
            )
        return cls(**{**found, **components})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publishes the pipeline with its code and its card: [`hfdiff.hub.push`], whose arguments it takes.

        Where the pipeline was opened without hfdiff, the card and the arguments are those of diffusers.
        """
        if PACKAGE == "hfdiff":
            return import_module("hfdiff.hub").push(self, repo_id, **kwargs)
        return super().push_to_hub(repo_id, **kwargs)


def own_memory(pipe: Any) -> None:
    """Copies weights that lie in a mapped file, at any address of it; some kernels round by the address."""
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.clone()

"""`eopt convert`: the checkpoint of another library's optimizer, for one of ours."""

import json
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, ClassVar

from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.files import write_atomically
from emerging_optimizers.cli.progress import asked


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write the state_dict of another library's optimizer as one that ours loads, with its options and moments.

    It takes files of torch.save and unpickles nothing but tensors and plain values. Parameters stay in their order; an
    optimizer of several rules (create_optimizer) needs the model: emerging_optimizers.convert_state_dict.
    """

    positional: ClassVar[tuple[str, ...]] = ("checkpoint",)
    checkpoint: Annotated[str, "A file that torch.save wrote."]
    to: Annotated[str, "A name from `eopt list`."]
    out: Annotated[str, "The file to write."]
    from_: Annotated[
        str | None,
        "torch.adamw, torch.muon, keller-jordan, nikhilvyas-soap, heavyball or published; by default it is recognised.",
    ] = None
    entry: Annotated[str | None, "Under which key of the file the state_dict is, as in 'optimizer'."] = None
    overwrite: Annotated[bool, "Replace the file of --out where there is one."] = False
    json: Annotated[bool, "Print JSON."] = False

    def run(self) -> None:
        """Converts, loads the result for a test, writes it, and says what was dropped."""
        out = Path(self.out).resolve()
        if out.exists() and not out.is_file():
            raise UsageError(f"--out {self.out!r} is no file that could be written; give another")
        if out.exists() and not self.overwrite:
            raise UsageError(f"{self.out} is there already; give another --out, or --overwrite to replace it")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = asked("convert", self._convert)
        asked("convert", lambda: write_atomically({out: _saved(made)}))
        notes = [str(one.message) for one in said]
        if self.json:
            print(
                json.dumps({"file": self.out, "to": self.to.lower(), "parameters": len(made["state"]), "said": notes})
            )
            return
        print(*notes, f"{self.out}: the state of {len(made['state'])} parameters, for {self.to.lower()}", sep="\n")

    def _convert(self) -> dict[str, Any]:
        import torch

        from emerging_optimizers.converting import SOURCES, convert_state_dict, options_of, read_entries, recognised
        from emerging_optimizers.registry import get_optimizer_cls

        if self.from_ is not None and self.from_ not in SOURCES:
            raise UsageError(
                f"--from {self.from_} is not one of {', '.join(SOURCES)}; leave it out to have it recognised"
            )
        saved = self._read()
        source = self.from_ or recognised(saved)
        groups = []
        for group in saved["param_groups"]:
            read = {
                i: read_entries(saved["state"].get(i, {}), group, source, f"parameter {i}") for i in group["params"]
            }
            params = [torch.nn.Parameter(_stand_in(entries, i)) for i, entries in read.items()]
            groups.append({**options_of(group, source, self.to.lower()), "params": params})
        if len({bool(group.get("use_muon")) for group in saved["param_groups"]}) > 1:
            raise UsageError(
                "the groups follow Muon and Adam (use_muon); make both with create_optimizer and call "
                "emerging_optimizers.convert_state_dict with its optimizer"
            )
        optimizer = get_optimizer_cls(self.to.lower())(groups, lr=groups[0].get("lr", 1e-3))
        optimizer.load_state_dict(convert_state_dict(saved, optimizer, source=source))
        made: dict[str, Any] = optimizer.state_dict()
        return made

    def _read(self) -> Mapping[str, Any]:
        saved = _loaded(self.checkpoint)
        if self.entry is not None:
            if not isinstance(saved, Mapping) or self.entry not in saved:
                raise UsageError(f"--entry {self.entry}: {self.checkpoint} has no such entry")
            saved = saved[self.entry]
        if not isinstance(saved, Mapping):
            raise UsageError(f"{self.checkpoint} has a {type(saved).__name__}, and no state_dict of an optimizer")
        if "param_groups" in saved:
            return saved
        if any(str(key).startswith("param_groups.") for key in saved):
            raise UsageError(
                f"{self.checkpoint} is flattened (flatten_optimizer_state_dict=True), which is not converted; save "
                "optimizer.state_dict()"
            )
        keys = ", ".join([str(key) for key in saved][:5]) + (", ..." if len(saved) > 5 else "")
        raise UsageError(
            f"{self.checkpoint} is no state_dict of an optimizer, its keys are {keys or 'none'}; give --entry"
        )


def _saved(made: Any) -> bytes:
    """What torch.save writes."""
    import torch

    content = BytesIO()
    torch.save(made, content)
    return content.getvalue()


def _loaded(checkpoint: str) -> Any:
    """What torch.save wrote into a file, without unpickling more than tensors and plain values.

    Raises:
        UsageError: it is another file, or a damaged one.
    """
    import torch

    path = Path(checkpoint)
    if path.is_dir():
        raise UsageError(
            f"{checkpoint!r} is a folder, as torch.distributed.checkpoint writes; load it with that, and give the "
            "state_dict to emerging_optimizers.convert_state_dict"
        )
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UsageError(f"{checkpoint!r} cannot be read ({error.strerror or error})") from error
    if not start:
        raise UsageError(f"{checkpoint} is empty")
    if start == b"PK\x03\x04":
        _sound(checkpoint)
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except UnpicklingError as error:
        raise UsageError(
            f"{checkpoint}: it is no file of torch.save, or has more than tensors and plain values in it, "
            "which is not unpickled; save optimizer.state_dict() alone"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a pickle of other bytes runs into
        raise UsageError(f"{checkpoint} is damaged, or no file of torch.save") from error


def _sound(checkpoint: str) -> None:
    """Looks at the checksums of a zip archive, which torch does not, and whether torch.save made it."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            names = archive.namelist()
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        raise UsageError(f"{checkpoint} is damaged: it is cut short, or its directory is overwritten") from None
    if damaged is not None:
        raise UsageError(f"{checkpoint} is damaged: the checksum of {damaged} in it is wrong")
    ends = {name.rpartition("/")[2] for name in names}
    if "data.pkl" not in ends or "constants.pkl" in ends:
        kind = "of torch.jit" if "constants.pkl" in ends else "with other files"
        raise UsageError(f"{checkpoint} is an archive {kind}, and no file of torch.save")


def _stand_in(entries: Mapping[str, Any], i: Any) -> Any:
    """A tensor shaped like a parameter, of which the file has the moments alone."""
    import torch

    for key in ("exp_avg", "momentum_buffer"):
        if isinstance(entries.get(key), torch.Tensor):
            return entries[key].new_zeros(entries[key].shape)
    raise UsageError(
        f"state[{i}] has neither exp_avg nor momentum_buffer, so that the parameter's shape is not known; call "
        "emerging_optimizers.convert_state_dict with the optimizer of the model"
    )

"""From text files to Megatron's indexed dataset and its manifest.

The result does not depend on the number of workers. Files are written in a folder of their own and published
by rename, the manifest last: a dataset without its manifest is not whole.
"""

import dataclasses
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from xdlm_megatron.data.documents import find_inputs, read_blocks
from xdlm_megatron.data.encode import BlockEncoder, Encoded, EncodeOptions, Part, encode_blocks
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.indexed import Manifest, megatron_indexed
from xdlm_megatron.data.tokenizer import Tokenizer

NUM_EXAMPLES = 3  # lines named for each reason to skip
SUFFIXES = (".bin", ".idx", ".json")  # in the order of their publication


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(EncodeOptions):
    """inputs: files and globs; output: PREFIX of the files; workers: processes.

    valid_fraction: share of the documents that go to PREFIX_valid. min_tokens: a document with fewer (without
    its end) is skipped. block_bytes: text that a worker takes at a time. vocab_size: states of the model, for
    one whose embedding has more rows than the tokenizer has ids; None: the tokenizer's.
    """

    inputs: tuple[str, ...]
    output: str
    workers: int = 1
    overwrite: bool = False
    block_bytes: int = 2 << 20
    vocab_size: int | None = None


@dataclass
class Report:
    """Figures so far, and once done the manifests by prefix. disk_bytes: of the input files, as stored."""

    disk_bytes: int = 0
    text_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)

    def add(self, encoded: Encoded) -> None:
        self.disk_bytes += encoded.disk_bytes
        for part in encoded.parts:
            self.text_bytes += part.text_bytes
            self.documents += len(part.lengths)
            self.tokens += part.ids.size
        for skip in encoded.skips:
            self.skipped[skip.reason] += 1
            named = self.examples.setdefault(skip.reason, [])
            if len(named) < NUM_EXAMPLES:
                named.append(skip.where)

    def skipped_lines(self) -> list[str]:
        """A readable line for each reason, the most frequent first."""
        lines = []
        for reason, count in self.skipped.most_common():
            more = ", ..." if count > NUM_EXAMPLES else ""
            lines.append(f"{count} x {reason} ({', '.join(self.examples[reason])}{more})")
        return lines


class _Writer:
    """One dataset in the making: Megatron's builder, with the figures for the manifest."""

    def __init__(self, stem: Path, tokenizer_dtype: type) -> None:
        self.stem = stem
        self.dtype = tokenizer_dtype
        self.documents = self.tokens = self.text_bytes = self.prompt_tokens = self.prompt_bytes = 0
        self._sha256 = hashlib.sha256()
        self._builder = megatron_indexed().IndexedDatasetBuilder(f"{stem}.bin", dtype=tokenizer_dtype)

    def add(self, part: Part) -> None:
        start = 0
        for lengths in part.lengths.tolist():
            self._builder.add_document(part.ids[start : start + sum(lengths)], lengths)
            start += sum(lengths)
        self._sha256.update(part.ids.tobytes())
        self.documents += len(part.lengths)
        self.tokens += part.ids.size
        self.text_bytes += part.text_bytes
        self.prompt_tokens += int(part.lengths[:, :-1].sum())
        self.prompt_bytes += part.prompt_bytes

    def close(self) -> None:
        """Closes the .bin without an index: the files will be thrown away."""
        self._builder.data_file.close()

    def finish(self, tokenizer: Tokenizer, options: PreprocessOptions, skipped: dict[str, int]) -> Manifest:
        """Writes the index and the manifest; all three files are on disk when it returns."""
        self._builder.finalize(f"{self.stem}.idx")
        files = {kind: Path(f"{self.stem}.{kind}") for kind in ("bin", "idx")}
        for path in files.values():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        manifest = Manifest(
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            bytes_per_token=round(self.text_bytes / self.tokens, 4),
            tokenizer=tokenizer.name,
            tokenizer_sha256=tokenizer.fingerprint,
            vocab_size=options.vocab_size or tokenizer.vocab_size,
            mask_id=tokenizer.mask_id,
            eod_id=tokenizer.eod_id,
            append_eod=options.append_eod,
            dtype=self.dtype.__name__,
            skipped=skipped,
            sizes={kind: path.stat().st_size for kind, path in files.items()},
            sha256={
                "bin": self._sha256.hexdigest(),
                "idx": hashlib.sha256(files["idx"].read_bytes()).hexdigest(),
            },
            arguments=dataclasses.asdict(options),
            prompt_tokens=None if options.prompt_key is None else self.prompt_tokens,
            prompt_bytes=None if options.prompt_key is None else self.prompt_bytes,
        )
        manifest.write(Path(f"{self.stem}.json"))
        return manifest


def preprocess(options: PreprocessOptions, progress: Callable[[Report], None] | None = None) -> Report:
    """Runs the whole; calls `progress` after each block. Raises DataError and then leaves nothing behind."""
    _check(options)
    paths = find_inputs(options.inputs)
    encode_options = EncodeOptions(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(EncodeOptions)}
    )
    encoder = BlockEncoder(encode_options)  # here too: a wrong tokenizer must say so before workers start
    if options.vocab_size is not None and options.vocab_size < encoder.tokenizer.vocab_size:
        raise DataError(
            f"vocab_size={options.vocab_size} must be at least {encoder.tokenizer.vocab_size}, the ids of "
            f"{options.tokenizer}; leave it out, or give the rows of the model's embedding"
        )
    prefixes = _prefixes(options)
    report = Report()
    parent = Path(options.output).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{Path(options.output).name}-") as folder:
        writers: list[_Writer] = []
        try:
            blocks = read_blocks(paths, options.block_bytes)
            for encoded in encode_blocks(blocks, encode_options, options.workers):
                report.add(encoded)
                if (
                    not writers and report.documents
                ):  # late: Megatron-Core's import is slow, bad input fails fast
                    writers = [_Writer(Path(folder) / prefix.name, encoder.dtype) for prefix in prefixes]
                for writer, part in zip(writers, encoded.parts, strict=False):
                    writer.add(part)
                if progress is not None:
                    progress(report)
            _check_result(options, report, writers)
        finally:
            for writer in writers:
                writer.close()
        for prefix, writer in zip(prefixes, writers, strict=True):
            report.manifests[str(prefix)] = writer.finish(encoder.tokenizer, options, dict(report.skipped))
        _publish(Path(folder), prefixes)
    return report


def _prefixes(options: PreprocessOptions) -> list[Path]:
    """[PREFIX] or [PREFIX, PREFIX_valid]."""
    valid = [Path(f"{options.output}_valid")] if options.valid_fraction > 0 else []
    return [Path(options.output), *valid]


def _check(options: PreprocessOptions) -> None:
    """The options, before any work."""
    if not 0 <= options.valid_fraction < 1:
        raise DataError(f"valid_fraction={options.valid_fraction} must lie in [0, 1); 0.05 holds out 5 %")
    for name in ("workers", "min_tokens", "block_bytes"):
        if getattr(options, name) < 1:
            raise DataError(f"{name}={getattr(options, name)} must be at least 1")
    if not Path(options.output).name or options.output.endswith(SUFFIXES):
        raise DataError(
            f"output {options.output} must be a path without .bin/.idx, for example data/shakespeare"
        )
    for prefix in (Path(options.output), Path(f"{options.output}_valid")):
        stays = prefix not in _prefixes(options)  # a held-out part of another run, which we would not replace
        for path in (Path(f"{prefix}{suffix}") for suffix in SUFFIXES):
            if path.exists() and (stays or not options.overwrite):
                cure = "remove it" if stays else "give --overwrite or another --output"
                raise DataError(f"output {path} exists already; {cure}")


def _check_result(options: PreprocessOptions, report: Report, writers: list[_Writer]) -> None:
    """There are documents, on both sides of the split."""
    if report.documents == 0:
        found = "; ".join(report.skipped_lines()) or "the input is empty"
        raise DataError(f"no document found in {' '.join(options.inputs)}: {found}")
    for writer, side in zip(writers, ("training", "held-out"), strict=False):
        if writer.documents == 0:
            raise DataError(
                f"valid_fraction={options.valid_fraction} leaves no {side} document of {report.documents}; "
                "take another fraction, or more and smaller documents"
            )


def _publish(folder: Path, prefixes: list[Path]) -> None:
    """Moves finished datasets into place. Old manifests go first, new ones come last."""
    for prefix in prefixes:
        Path(f"{prefix}.json").unlink(missing_ok=True)
    for suffix in SUFFIXES:
        for prefix in prefixes:
            os.replace(folder / f"{prefix.name}{suffix}", f"{prefix}{suffix}")
    parent = os.open(prefixes[0].parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)

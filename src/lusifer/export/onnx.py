"""A whole model as one ONNX graph: token ids and their mask in, unit vectors out, the tokenizer beside it.

torch's own exporter writes the graph, in float32, adapters merged. It is compared with the model before the folder
appears: ONNX Runtime must give the vectors that torch gives.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor, nn

from lusifer.data.everyday_set import load_everyday
from lusifer.errors import LusiferError, first_line
from lusifer.loading import load_checkpoint
from lusifer.locks import alone_at_new
from lusifer.model.modeling import LusiferModel
from lusifer.publishing import publish_folder, write_json
from lusifer.quiet import muted

GRAPH, TOKENIZER, SETTINGS = "model.onnx", "tokenizer.json", "config.json"
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "sentence_embedding"
TOLERANCE = 1e-4
_NEEDS = ("onnx", "onnxruntime", "onnxscript")
_ONE_FILE = 1 << 30  # Protobuf ends at 2 GiB; larger weights lie in model.onnx.data.


def export_onnx(name: str, output: Path) -> dict[str, Any]:
    """Writes ``model.onnx``, ``tokenizer.json`` and ``config.json``, complete or not at all.

    The graph takes ``input_ids`` and ``attention_mask``, (batch, seq) int64 of any batch and length up to the model's
    window, and gives ``sentence_embedding``, (batch, dim) float32 unit vectors. The tokenizer pads and truncates as the
    model's own does; ``config.json`` holds the window and the prompts.

    Args:
        name: A checkpoint or any Sentence Transformers model of one transformer, as `lusifer.loading.resolve` takes it.
        output: The folder to make.

    Returns:
        ``model``, the folder; ``megabytes``; ``dimension``; ``difference``, the largest of a component between ONNX
        Runtime and torch.

    Raises:
        LusiferError: If a library is missing, the folder exists, the model cannot be exported, or ONNX Runtime's
            vectors differ from torch's by more than 1e-4.
    """
    missing = [module for module in _NEEDS if find_spec(module) is None]
    if missing:
        raise LusiferError(f"the export to ONNX needs {', '.join(missing)}: pip install 'lusifer[onnx]'")
    with alone_at_new(output):
        model = _plain(name)
        with publish_folder(output, "ONNX model") as folder:
            _write_tokenizer(name, model, folder)
            _write_graph(name, model, folder)
            difference = largest_difference(model, folder)
            if not difference <= TOLERANCE:
                raise LusiferError(
                    f"cannot export {name!r} to ONNX: vectors differ from the model's by {difference:.1e}, more than "
                    f"{TOLERANCE:.0e}"
                )
            size = sum(path.stat().st_size for path in folder.iterdir())
    facts = {"megabytes": round(size / 1e6, 1), "dimension": model.get_embedding_dimension()}
    return {"model": str(output), **facts, "difference": difference}


class Embedder(nn.Module):
    """A model as a function of two tensors.

    Args:
        model: The model, on one device.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, dim) embeddings of token ids and their mask, (batch, seq) int64 each."""
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        for module in self.model:
            features = module(features)
        return features[OUTPUT]


def _plain(name: str) -> SentenceTransformer:
    """The model on the CPU in float32, without adapters."""
    model = load_checkpoint(name, device="cpu")
    inner = getattr(model[0], "auto_model", None)
    if inner is None:
        raise LusiferError(f"cannot export {name!r} to ONNX: it has no transformer")
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise LusiferError(f"cannot export {name!r} to ONNX: its LLM is quantised; load it without quantization")
    model = model.float()
    if isinstance(inner, LusiferModel):
        inner.merge()
    return model.eval()


def _write_tokenizer(name: str, model: SentenceTransformer, folder: Path) -> None:
    own: Any = model.tokenizer
    backend = getattr(own, "backend_tokenizer", None)
    if backend is None or own.pad_token_id is None:
        raise LusiferError(f"cannot export {name!r} to ONNX: its tokenizer has no tokenizer.json, or no padding token")
    window = int(model.max_seq_length or 512)
    tokenizer = Tokenizer.from_str(backend.to_str())  # A copy: the model's own keeps its settings.
    tokenizer.enable_truncation(window, direction=own.truncation_side)
    tokenizer.enable_padding(direction=own.padding_side, pad_id=own.pad_token_id, pad_token=own.pad_token)
    tokenizer.save(str(folder / TOKENIZER))
    settings = {
        "dimension": model.get_embedding_dimension(),
        "max_seq_length": window,
        "prompts": dict(model.prompts),
        "default_prompt_name": model.default_prompt_name,
    }
    write_json(folder / SETTINGS, settings)


def _write_graph(name: str, model: SentenceTransformer, folder: Path) -> None:
    # Any two rows do, as nothing in the graph follows their values; equal sizes could be taken for one.
    example = (torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long))
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad(), muted("torch.onnx", "onnxscript", "onnx_ir"):  # An account of every node.
            traced = torch.export.export(Embedder(model).eval(), example, dynamic_shapes=(dynamic, dynamic))
            program: Any = torch.onnx.export(traced, input_names=INPUTS, output_names=[OUTPUT], verbose=False)
    except Exception as error:  # Whatever stands in the way of one architecture or another.
        reason = first_line(error.__cause__ or error)
        raise LusiferError(f"cannot export {name!r} to ONNX: {reason}") from error
    for part in (program.model, program.model.graph, *program.model.graph.all_nodes()):
        part.metadata_props.clear()  # Where every line of code lies on this machine.
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    program.save(folder / GRAPH, external_data=size > _ONE_FILE)


class OnnxEmbedder:
    """An exported model, run as anybody would without this package.

    Args:
        folder: What `export_onnx` made.
        threads: Threads of an operator; ONNX Runtime's choice when None.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self.session = onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])

    def features(self, texts: list[str]) -> dict[str, np.ndarray]:
        """The graph's inputs for texts, (batch, seq) int64 each."""
        rows = self.tokenizer.encode_batch(texts)
        values = ([row.ids for row in rows], [row.attention_mask for row in rows])
        return {name: np.array(value, dtype=np.int64) for name, value in zip(INPUTS, values, strict=True)}

    def encode(self, texts: list[str]) -> np.ndarray:
        """(n, dim) float32 unit vectors of texts, in one batch."""
        return self.session.run([OUTPUT], self.features(texts))[0]


def largest_difference(model: SentenceTransformer, folder: Path) -> float:
    """The largest difference of a component between ONNX Runtime and torch.

    Texts of 23 languages in batches of several sizes, padded ones and one text of the model's whole window among them,
    and a text with nothing in it.

    Args:
        model: The model in float32, adapters merged.
        folder: What it was exported to.
    """
    texts = [rows[0] for rows in load_everyday().sentences.values()]
    tokenizer: Any = model.tokenizer
    window = int(model.max_seq_length or 512)
    exported, embedder = OnnxEmbedder(folder), Embedder(model).eval()
    shared = {"padding": True, "truncation": True, "max_length": window, "return_tensors": "pt", "verbose": False}
    difference = 0.0
    for batch in (texts[:1], texts[:3], ["", *texts], [" ".join(texts * window)[: 20 * window], texts[0]]):
        features = tokenizer(batch, **shared)
        with torch.inference_mode():
            expected = embedder(*(features[name] for name in INPUTS)).numpy()
        difference = max(difference, float(np.abs(exported.encode(batch) - expected).max()))
    return difference

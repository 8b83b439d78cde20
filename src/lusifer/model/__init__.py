"""The model: a multilingual encoder, a connector and a decoder LLM that embed texts together.

* `modeling` is the model, one class for all stages; `configuration` its sizes, `connector` what maps encoder states to
  soft tokens, `pooling` what makes one vector of many states, `packing` where the real positions of a batch stand.
* `backbones` loads an encoder or an LLM, `backbone_pair` checks, identifies and loads both; `backbone_alone` uses one
  without the other. `adapters` are LoRA adapters, `published_adapters` those that an LLM comes with.
* `checkpoint` says what is stored and read back, `sentence_transformer` writes and wraps whole checkpoints, `card`
  their model card, `fingerprint` says which model it is.
* `text_encoder` embeds texts at the speed of the hardware, in batches of `token_batches`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lusifer.lazy import lazy

if TYPE_CHECKING:
    from lusifer.model.configuration import LusiferConfig
    from lusifer.model.modeling import LusiferModel
    from lusifer.model.text_encoder import TextEncoder

__all__ = ["LusiferConfig", "LusiferModel", "TextEncoder"]

__getattr__ = lazy(
    __name__, {"LusiferConfig": "configuration", "LusiferModel": "modeling", "TextEncoder": "text_encoder"}
)

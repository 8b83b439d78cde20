"""LusiferModel: a multilingual encoder in front of a decoder LLM, joined by a connector.

1. The encoder reads the text; the connector turns each token state into a soft token.
2. Each row becomes ``[bos] soft tokens [added tokens]``, packed to the left, so that no embedding depends on padding.
3. The LLM reads it bidirectionally and its states are pooled; given a target text, it reads the target too, causally,
   to predict it (LUSIFER, arXiv 2501.00874, section 3).
4. Where ``lusifer adapt`` made the encoder, that has an embedding of its own, to which the head adds the LLM's part.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lusifer.errors import LusiferError
from lusifer.hooks.transformers import InitializesParts, cached_or_none
from lusifer.model.adapters import add_lora, forget_copy, is_merged_in_place, merge_adapters, merge_in_place
from lusifer.model.backbone_pair import configure, load_backbones, position_table
from lusifer.model.backbones import HUB_KEYS, build_encoder, build_llm, load_tokenizer
from lusifer.model.checkpoint import check_header, load_standalone, load_stored, stored_state
from lusifer.model.configuration import LusiferConfig
from lusifer.model.connector import FeedForwardConnector, build_head, connector_shapes
from lusifer.model.direction.masks import masked_directions, set_needs_mask
from lusifer.model.direction.measured import check_encoder, settle_direction
from lusifer.model.packing import pack_left, run_llm
from lusifer.model.pooling import pool
from lusifer.model.token_batches import padding_groups, run_groups
from lusifer.trust import check_files


class LusiferModel(InitializesParts, PreTrainedModel):
    """Encoder, connector, decoder LLM, pooling and optional MLP head.

    Args:
        config: The model's configuration; both sub-configurations must be set.
        encoder: A loaded encoder; built with random weights when None.
        llm: A loaded LLM without LM head; built with random weights when None.

    Attributes:
        window: Most tokens that the encoder's positions allow, special tokens included; None where they have no end.
        tokenizer_source: Folder or hub id, and options, of the tokenizer that `save_pretrained` saves; None saves none.
    """

    config_class = LusiferConfig
    base_model_prefix = "lusifer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Whatever the backbones are loaded as: they are small, and what was trained.
    _keep_in_fp32_modules_strict = {"connector", "head"}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: LusiferConfig, encoder: PreTrainedModel | None = None, llm: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        self.encoder = encoder if encoder is not None else build_encoder(config.encoder_config)
        self.llm = llm if llm is not None else build_llm(config.llm_config)
        encoder_dim, llm_dim = config.token_config.hidden_size, config.llm_config.hidden_size
        self.connector = FeedForwardConnector(
            encoder_dim, config.connector_dim or llm_dim, llm_dim, config.num_added_tokens, config.connector_residual
        )
        self.head = build_head(config)
        table = position_table(self.encoder)
        self.window = None if table is None else table.window
        self.tokenizer_source: tuple[str, dict[str, Any]] | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves connector and head as their constructors made them; backbones initialise themselves."""

    @classmethod
    def from_backbones(
        cls,
        encoder: str,
        llm: str,
        *,
        llm_layers: int | None = None,
        encoder_dtype: torch.dtype | str = torch.float32,
        llm_dtype: torch.dtype | str = torch.float32,
        attn_implementation: str | None = None,
        quantization: str | None = None,
        device: torch.device | None = None,
        **config: Any,
    ) -> LusiferModel:
        """Builds an untrained model from two pretrained backbones.

        Args:
            encoder: Hub id, local folder or starter name of a bidirectional encoder or encoder-decoder.
            llm: The same of a decoder LLM.
            llm_layers: Use only the LLM's first layers; all when None.
            encoder_dtype: Data type of the encoder's weights.
            llm_dtype: Data type of the LLM's weights.
            attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; transformers' choice when None.
            quantization: ``8bit`` or ``4bit`` loads the LLM's linear layers so; they stay frozen.
            device: Where the weights are loaded to, without a copy in the host's memory; the CPU when None.
            **config: Further fields of `LusiferConfig`; ``max_seq_length`` is 512 or what the encoder reads.

        Raises:
            LusiferError: If a backbone cannot be loaded, is of the wrong kind, has no fitting tokenizer, or cannot read
                as many tokens as ``max_seq_length`` says, or the LLM cannot read both ways and causally.
        """
        built = configure(encoder, llm, llm_layers=llm_layers, **config)
        parts = load_backbones(built, encoder_dtype, llm_dtype, attn_implementation, quantization, device)
        check_encoder(encoder, parts[0], built.token_config.hidden_size)
        settle_direction(llm, parts[1])
        set_needs_mask(built.llm_config, masked_directions(parts[1].config))  # The checkpoint reads as it was trained.
        model = cls(built, *parts).to(parts[1].device)
        model.tokenizer_source = (str(built.encoder), {"revision": built.encoder_revision})
        embeddings = model.llm_embeddings().float()
        model.connector.scale_to(embeddings.mean(dim=0), float(embeddings.std(dim=0).mean()))
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> LusiferModel:
        """Loads a checkpoint folder or hub id: standalone by transformers' own loader, a small one on top of its
        backbones.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            *args: For transformers' loader.
            **kwargs: As for ``PreTrainedModel.from_pretrained``; ``dtype`` sets both backbones' data types, else those
                of the configuration; ``encoder_dtype``, ``llm_dtype`` and ``quantization`` are as for `from_backbones`
                and, like there, for checkpoints on top of backbones.

        Raises:
            LusiferError: If the checkpoint cannot be read, or a backbone is missing.
        """
        name = str(pretrained_model_name_or_path)
        config, quantization = kwargs.pop("config", None), kwargs.pop("quantization", None)
        given = {part: kwargs.pop(f"{part}_dtype", None) for part in ("encoder", "llm")}
        hub = {key: kwargs[key] for key in (*HUB_KEYS, "revision", "subfolder") if kwargs.get(key) is not None}
        check_files(repr(name), name, **hub)
        if not isinstance(config, LusiferConfig):
            config = LusiferConfig.from_pretrained(name, **hub)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        if config.standalone:
            model = load_standalone(partial(super().from_pretrained, name, *args), name, config, dtype, **kwargs)
            model.tokenizer_source = (name, hub)
            return model
        check_header(name, connector_shapes(config), **hub)
        chosen = None if dtype == "auto" else dtype
        stored = {"encoder": config.encoder_config.dtype, "llm": config.llm_config.dtype}
        encoder, llm = (given[part] or chosen or stored[part] or torch.float32 for part in ("encoder", "llm"))
        shared = {key: value for key, value in hub.items() if key in HUB_KEYS}
        attention = kwargs.get("attn_implementation")
        placed = kwargs.get("device_map")
        placed = next(iter(placed.values())) if isinstance(placed, dict) else placed
        device = None if placed is None or placed == "auto" else torch.device(placed)
        model = cls(config, *load_backbones(config, encoder, llm, attention, quantization, device, **shared))
        own = cached_or_none(name, "tokenizer_config.json", **hub) is not None
        model.tokenizer_source = (name, hub) if own else (config.encoder, {"revision": config.encoder_revision})
        model.put_adapters()
        load_stored(model, name, **hub)
        return model.to(model.llm.device).eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes a whole checkpoint: weights (what was trained, or all if ``config.standalone``) and tokenizer.

        Where Sentence Transformers saves, it writes weights and configuration alone.

        Args:
            save_directory: Folder to write to.
            **kwargs: As for ``PreTrainedModel.save_pretrained``.

        Raises:
            LusiferError: If the adapters were merged for inference, or the encoder's tokenizer cannot be read.
        """
        from lusifer.model.sentence_transformer import CONFIG, save_around  # Seconds, for those who save.

        if is_merged_in_place(self):
            raise LusiferError("this model was merged for inference and cannot be saved: load the checkpoint again")
        folder = Path(save_directory)
        whole = not (folder / CONFIG).is_file()
        # Under the names the modules have: those of a backbone's first release, which transformers would go back to, do
        # not tell where an adapter belongs.
        kwargs["save_original_format"] = False
        kwargs["state_dict"] = stored_state(self, kwargs.get("state_dict") or self.state_dict())
        super().save_pretrained(save_directory, **kwargs)
        # safetensors makes its files private; a checkpoint's have the rights of its configuration.
        for path in folder.glob("*.safetensors"):
            path.chmod((folder / "config.json").stat().st_mode & 0o777)
        if whole and self.tokenizer_source is not None:
            name, hub = self.tokenizer_source
            save_around(folder, self.config, load_tokenizer("encoder", name, config=self.config.encoder_config, **hub))

    def merge(self) -> LusiferModel:
        """Merges the adapters into the backbones, in place, and makes checkpoints of it standalone."""
        merge_adapters(self)
        self.config.make_standalone()
        return self

    def merge_for_inference(self) -> LusiferModel:
        """Merges the adapters in place, for speed without a second copy; it can no longer be trained or saved."""
        merge_in_place(self)
        return self.eval()

    def train(self, mode: bool = True) -> LusiferModel:
        """As for any module; frees the merged copy that encoding made, and refuses adapters merged for inference."""
        if mode:
            if is_merged_in_place(self):
                raise LusiferError("this model was merged for inference and cannot train: load the checkpoint again")
            forget_copy(self)
        super().train(mode)
        if self.config.adapted and not any(p.requires_grad for p in self.encoder.parameters()):
            self.encoder.eval()  # Its embedding is what the LLM adds to: without dropout, as in use.
        return self

    def put_adapters(self) -> None:
        """Puts the adapters in place that the configuration names, for their weights to be read into."""
        for part in ("encoder", "llm"):
            if fields := getattr(self.config, f"{part}_adapter"):
                add_lora(self._layers(part), fields)

    def _layers(self, part: str) -> nn.Module:
        """Where an adapter of a part goes: an adapted encoder's own head takes none."""
        module: Any = getattr(self, part)
        inner: nn.Module = module.encoder if part == "encoder" and self.config.adapted else module
        return inner

    def add_adapter(self, part: str, adapter: dict[str, Any]) -> None:
        """Puts a LoRA adapter on the encoder or the LLM.

        Args:
            part: ``encoder`` or ``llm``.
            adapter: Fields of ``peft.LoraConfig``; ``target_modules`` defaults to every linear layer.

        Raises:
            LusiferError: If the part already has an adapter or PEFT refuses the configuration.
        """
        if part not in ("encoder", "llm"):
            raise LusiferError(f"an adapter goes on 'encoder' or 'llm', not {part!r}")
        if getattr(self.config, f"{part}_adapter"):
            raise LusiferError(f"the {part} already has an adapter")
        setattr(self.config, f"{part}_adapter", add_lora(self._layers(part), adapter))

    def set_trainable(self, *, encoder: str, connector: bool, llm: bool) -> None:
        """Chooses what trains: a stage is nothing but this choice and a loss.

        Args:
            encoder: ``frozen``, ``lora`` (its adapter only) or ``full``.
            connector: Whether connector and head train.
            llm: Whether the LLM's adapter trains; its own weights never do.

        Raises:
            LusiferError: If an adapter is asked for that does not exist.
        """
        if encoder == "lora" and not self.config.encoder_adapter:
            raise LusiferError("the encoder has no adapter to train; add one or choose frozen or full")
        if llm and not self.config.llm_adapter:
            raise LusiferError("the LLM has no adapter to train; add one")
        for name, parameter in self.named_parameters():
            adapter = "lora_" in name
            parts = {"encoder": encoder == "full" or (encoder == "lora" and adapter), "llm": llm and adapter}
            parameter.requires_grad_(parts.get(name.split(".")[0], connector))
        if encoder == "full":
            self.config.encoder_stored = True

    def llm_embeddings(self) -> Tensor:
        """The LLM's input embedding matrix, (vocab, llm_dim), as the LLM itself feeds it to its layers."""
        table: Any = self.llm.get_input_embeddings()
        return table.weight.detach() * float(getattr(table, "scalar_embed_scale", 1.0))

    def bos_embedding(self) -> Tensor | None:
        """(llm_dim,) float32 embedding that stands before the soft tokens; None where the model has none."""
        configured = self.config.llm_config.bos_token_id
        bos_id = configured[0] if isinstance(configured, list) else configured
        if not self.config.use_bos or bos_id is None:
            return None
        table: Any = self.llm.get_input_embeddings()
        return table(torch.tensor(bos_id, device=table.weight.device)).float()

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's token embeddings: the first thing an input meets."""
        return self.encoder.get_input_embeddings()

    def soft_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Runs encoder and connector.

        Args:
            input_ids: (batch, seq) int64, encoder token ids, padded on either side.
            attention_mask: (batch, seq), non-zero at real tokens.

        Returns:
            ``[bos] soft tokens [added tokens]`` (batch, length, llm_dim) float32; its mask; and the mask of positions
            to pool (all but BOS), both (batch, length) bool.
        """
        return self._soft_tokens(*self._read(input_ids, attention_mask))

    def _read(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Any, Tensor]:
        """The encoder's output for rows packed to the left, and the mask of their real tokens."""
        # Encoders with absolute positions (BERT) count padding on the left too.
        packed_ids, real = pack_left(input_ids.unsqueeze(-1), attention_mask.bool())
        seen = real.clone()
        # A row with nothing in it: attention over nothing is NaN, and so is everything it touches.
        seen[:, 0] |= ~real.any(dim=1)
        return self.encoder(input_ids=packed_ids.squeeze(-1), attention_mask=seen.to(attention_mask.dtype)), real

    def _soft_tokens(self, output: Any, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        soft = self.connector(output.last_hidden_state.to(self.connector.up.weight.dtype)).float()
        added = self.connector.added_tokens.float().expand(soft.shape[0], -1, -1)
        parts, masks = [soft, added], [real, real.new_ones(added.shape[:2])]
        pooled = masks
        if (bos := self.bos_embedding()) is not None:
            one = real.new_ones(soft.shape[0], 1)
            parts, masks = [bos.expand(soft.shape[0], 1, -1), *parts], [one, *masks]
            pooled = [~one, *pooled]
        mask = torch.cat(masks, dim=1)
        packed, packed_mask = pack_left(torch.cat(parts, dim=1), mask)
        # Without BOS and added tokens an empty text leaves nothing to attend to: it gets a zero vector.
        packed_mask[:, 0] |= ~packed_mask.any(dim=1)
        pool_mask = pack_left(torch.cat(pooled, dim=1).unsqueeze(-1), mask)[0].squeeze(-1).bool()
        return packed, packed_mask, pool_mask

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        *,
        target_ids: Tensor | None = None,
        target_mask: Tensor | None = None,
        target_masked: Tensor | None = None,
        mask_embedding: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Embeds texts or, given targets, reads them causally after the texts' soft tokens (stage 1).

        Args:
            input_ids: (batch, seq) int64, encoder token ids, padded on either side.
            attention_mask: (batch, seq), non-zero at real tokens; all real when None.
            return_dict: Accepted for Sentence Transformers; the output is always a dict-like object.
            target_ids: (batch, target_seq) int64, LLM token ids of the targets, padded on the right.
            target_mask: (batch, target_seq), non-zero at real target tokens; all real when None.
            target_masked: (batch, target_seq) bool, where ``mask_embedding`` replaces the target's input; nowhere when
                None.
            mask_embedding: (llm_dim,), needed with ``target_masked``.

        Returns:
            ``last_hidden_state`` (batch, length, llm_dim) over ``[bos] soft [added]`` and ``pooler_output`` (batch,
            dim) float32, not normalised. With targets ``last_hidden_state`` (supervised, llm_dim), the states that
            predict the real target tokens, row by row in order, and an adapted encoder's own ``pooler_output``.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # While gradients flow a batch stays whole; distributed wrappers must see one forward pass per batch.
        whole = torch.is_grad_enabled() or self.training or dist.is_initialized() or torch.compiler.is_exporting()
        if target_ids is None and not whole and (groups := padding_groups(attention_mask)):
            batch = {"input_ids": input_ids, "attention_mask": attention_mask}
            return run_groups(self, batch, groups)
        output, real = self._read(input_ids, attention_mask)
        own = output.pooler_output if self.config.adapted else None
        embeds, mask, pooled = self._soft_tokens(output, real)
        if target_ids is not None:
            table: Any = self.llm.get_input_embeddings()
            target = table(target_ids).float()
            if target_masked is not None:
                assert mask_embedding is not None
                target = torch.where(target_masked.unsqueeze(-1), mask_embedding.float(), target)
            target_mask = torch.ones_like(target_ids) if target_mask is None else target_mask
            states = self._predict(embeds, mask, target, target_mask.bool())
            return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=own)
        hidden = run_llm(self.llm, embeds, mask, is_causal=False)
        # A row without tokens has nothing to pool if there are no added tokens either.
        pooled = pooled | (mask & ~pooled.any(dim=1, keepdim=True))
        vector = pool(hidden, pooled, self.config.pooling)
        if self.head is not None:
            vector = self.head(vector)
        if own is not None:
            vector = own + vector
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=vector)

    def _predict(self, prefix: Tensor, prefix_mask: Tensor, target: Tensor, target_mask: Tensor) -> Tensor:
        """The states before each real target token, so that no position has seen what it predicts."""
        mask = torch.cat([prefix_mask, target_mask], dim=1)
        packed, packed_mask = pack_left(torch.cat([prefix, target], dim=1), mask)
        hidden = run_llm(self.llm, packed, packed_mask, is_causal=True)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        start = prefix_mask.sum(dim=1, keepdim=True) - 1
        return hidden[(positions >= start) & (positions < start + target_mask.sum(dim=1, keepdim=True))]


AutoModel.register(LusiferConfig, LusiferModel, exist_ok=True)

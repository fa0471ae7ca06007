"""Every knob of a run, declared once: its type, its default and one line that says what it is.

A recipe is one YAML file with these sections; a field without a default must be given. Names that reach
Megatron-Core keep its spelling. What follows from other knobs is computed in `derive.py`, never stored.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as section

from xdlm_megatron.config.fields import (
    STRICT,
    AtLeastTwo,
    Flag,
    Fraction,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Probability,
    Seed,
    SmallFraction,
)
from xdlm_megatron.config.samplers import AncestralSampler, Sampler


@section(frozen=True, kw_only=True, config=STRICT)
class Run:
    name: Name
    """Name of the run; its folder is output_dir/name."""
    output_dir: str = "runs"
    """Folder that holds the run folders."""
    seed: Seed = 1
    """Seed of initialisation, data order, noise and dropout; every random number is a function of it."""


@section(frozen=True, kw_only=True, config=STRICT)
class Diffusion:
    uniform_ratio: Fraction = 0.1
    """Share of the noise that is uniform over the vocabulary (the paper's k): 0 is MDLM, 1 is UDLM."""
    schedule: Literal["loglinear", "cosine", "snr"] = "loglinear"
    """alpha(t): loglinear (the paper's, linear in t), cosine, or snr: snr/(snr+1) with log-linear snr."""
    alpha_min: SmallFraction = 1e-3
    """Floor of alpha at t = 1 (the paper's 1e-3)."""
    t_min: SmallFraction = 1e-3
    """Training and evaluation draw t from (t_min, 1) (the paper's 1e-3)."""
    time_per: Literal["sequence", "document"] = "sequence"
    """Whether a sequence has one t, or each document in it its own (data.packing=documents)."""


@section(frozen=True, kw_only=True, config=STRICT)
class Model:
    num_layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt
    """Width of the SwiGLU inner layer (of each of its two halves)."""
    num_attention_heads: PositiveInt
    """Query heads."""
    num_query_groups: PositiveInt | None = None
    """Key/value heads (GQA); None: as many as query heads."""
    kv_channels: PositiveInt | None = None
    """Width of a head; None: hidden_size / num_attention_heads."""
    qk_layernorm: Flag = True
    """RMSNorm on queries and keys."""
    share_embeddings_and_output_weights: Flag = False
    """Tie the output head to the embedding."""
    rotary_base: PositiveInt = 10_000
    """Base of the rotary position embedding."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    hidden_dropout: Probability = 0.0
    """Dropout after attention and after the MLP."""
    attention_dropout: Probability = 0.0
    """Dropout on attention weights."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    zero_init_head: Flag = True
    """Start from the uniform predictor (loss log(V-1)), as the paper does; no effect on a tied head."""
    autoregressive: Flag = False
    """Predict each token from those before it, by causal attention: the twin that a study compares with."""
    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """Layers by Transformer Engine (transformer_engine), PyTorch (local), or auto: the first if it runs."""
    mcore: dict[str, Any] = field(default_factory=dict)
    """Further fields passed verbatim to Megatron-Core's TransformerConfig; names are checked there."""


@section(frozen=True, kw_only=True, config=STRICT)
class Parallel:
    tensor_model_parallel_size: PositiveInt = 1
    """Processes that share each layer's matrices."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Processes that share the depth."""
    virtual_pipeline_model_parallel_size: AtLeastTwo | None = None
    """Model chunks per pipeline stage (interleaved schedule)."""
    context_parallel_size: PositiveInt = 1
    """Processes that share each sequence: every one has a slice of it and gathers keys and values."""
    sequence_parallel: Flag = False
    """Split norms and residuals along the sequence over the tensor-parallel group."""
    overlap_grad_reduce: Flag = False
    """Reduce gradients over data parallel while backward goes on."""
    overlap_param_gather: Flag = False
    """Gather the updated weights of a layer while forward is in the layers before it."""
    distributed_timeout_minutes: PositiveFloat = 10.0
    """A collective that waits longer ends the job."""


@section(frozen=True, kw_only=True, config=STRICT)
class Precision:
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameters and activations: float32 or bfloat16; master weights and the loss are float32 in both."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """Matrix products of the layers in FP8: e4m3, or hybrid with e5m2 for gradients; null: none."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """FP8's scales: tensorwise, or of steps before (delayed), blockwise (128) or mxfp8 (32, Blackwell)."""
    fp8_param_gather: Flag = False
    """Keep and gather the layers' weights in FP8; master weights stay float32."""
    num_layers_at_start_in_bf16: NonNegativeInt = 0
    """First layers that stay in bfloat16."""
    num_layers_at_end_in_bf16: NonNegativeInt = 0
    """Last layers that stay in bfloat16."""


@section(frozen=True, kw_only=True, config=STRICT)
class Data:
    train_prefix: str
    """Training set: PREFIX.bin, PREFIX.idx and PREFIX.json as tools/preprocess_data.py writes them."""
    valid_prefix: str | None = None
    """Held-out set, same format; None: no evaluation."""
    tokenizer: str
    """SentencePiece .model or Hugging Face tokenizer.json."""
    seq_length: PositiveInt
    """Tokens in a sample."""
    packing: Literal["stream", "documents", "padded"] = "stream"
    """Documents end to end, read as one (stream) or each for itself (documents); padded: one a sample."""
    clean_prompts: Flag = False
    """Leave each document's prompt (tools/preprocess_data.py --prompt-key) un-noised and out of the loss."""
    random_length_fraction: Fraction = 0.0
    """Share of training samples of which only a random number of tokens is read and scored (LLaDA: 0.01)."""
    vocab_size: AtLeastTwo
    """Number of states, the mask token counted."""
    mask_id: NonNegativeInt
    """Id of the mask token."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding is padded to a multiple of this times tensor_model_parallel_size."""


@section(frozen=True, kw_only=True, config=STRICT)
class Optimizer:
    lr: PositiveFloat
    """Peak learning rate of AdamW."""
    adam_beta1: Probability = 0.9
    """Decay of the first moment."""
    adam_beta2: Probability = 0.999
    """Decay of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Epsilon of Adam."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (matrices only: norms are exempt)."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    use_distributed_optimizer: Flag = True
    """Shard optimizer state and EMA over the data-parallel group."""
    optimizer_cpu_offload: Flag = False
    """Keep optimizer state and EMA in the CPU's memory, and update there."""
    optimizer_offload_fraction: PositiveFraction = 1.0
    """Share of the parameters for which it is."""
    ema_decay: Probability = 0.9999
    """Decay of the averaged weights, ramped as min(decay, (1+n)/(10+n)); 0 turns them off."""


@section(frozen=True, kw_only=True, config=STRICT)
class ConstantLr:
    kind: Literal["constant"]
    """Warm up, then stay at optimizer.lr."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""


@section(frozen=True, kw_only=True, config=STRICT)
class CosineLr:
    kind: Literal["cosine"]
    """Warm up, then half a cosine down to min_lr at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end."""


@section(frozen=True, kw_only=True, config=STRICT)
class WsdLr:
    kind: Literal["wsd"]
    """Warm up, stay, then decay to min_lr over the last decay_steps."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    decay_steps: PositiveInt
    """Steps of decay at the end."""
    decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"
    """Shape of the decay: linear, cosine, exponential (2^(1-x) - 1) or minus_sqrt (1 - sqrt x)."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end."""


LrSchedule = Annotated[ConstantLr | CosineLr | WsdLr, Field(discriminator="kind")]


@section(frozen=True, kw_only=True, config=STRICT)
class Train:
    num_steps: PositiveInt
    """Optimizer steps."""
    micro_batch_size: PositiveInt
    """Sequences a process takes at once."""
    global_batch_size: PositiveInt
    """Sequences in an optimizer step, over all processes and accumulated micro-batches."""
    rampup_batch_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """[start, increment, samples]: batches grow from start to global_batch_size over the first samples."""
    fuse_head: Literal["auto", "always", "never"] = "auto"
    """Head and loss together, without a micro-batch's logits: always, never, or auto (where that pays)."""
    kernels: Literal["auto", "cuda", "reference"] = "auto"
    """Loss and sampling by CUDA kernels (cuda), by PyTorch (reference), or by what the GPU can run (auto)."""
    compile: Flag = False
    """Random numbers of the noise by torch.compile: one kernel for the 120 of PyTorch, the same bits."""
    log_interval: PositiveInt = 10
    """Steps between logged lines."""
    max_skipped_steps: PositiveInt = 10
    """Consecutive steps with a non-finite gradient that end the run."""
    spike_factor: PositiveFloat | None = 10.0
    """Report a loss not finite or this many robust deviations above the recent median; null: no reports."""
    init_from: str | None = None
    """Checkpoint (or a folder of them: its latest) whose weights a new run begins with; null: random ones."""
    stop_after_step: PositiveInt | None = None
    """Save and stop cleanly after this step; the schedule still aims at num_steps."""


@section(frozen=True, kw_only=True, config=STRICT)
class Checkpoint:
    save_interval: PositiveInt = 1000
    """Steps between checkpoints; one more is written at the end and on a signal to stop."""
    async_save: Flag = False
    """Write files while training goes on, from a copy in the CPU's memory."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of these steps stay for ever; None: none does."""


@section(frozen=True, kw_only=True, config=STRICT)
class Tracking:
    mlflow: str | None = "local"
    """'local': a SQLite store in run.output_dir; an http(s) URI: a server; null: none (JSON lines only)."""
    experiment: str = "xdlm"
    """MLflow experiment."""
    parent_run: Name | None = None
    """Name of the MLflow run that this one is a child of, one for all runs of a sweep; null: of none."""


@section(frozen=True, kw_only=True, config=STRICT)
class Evaluation:
    interval: PositiveInt = 1000
    """Steps between held-out evaluations; one more is made at the end."""
    num_sequences: PositiveInt = 256
    """Held-out sequences (fewer if the set is smaller), always the same with the same noise."""
    num_noise_draws: PositiveInt = 1
    """Noise levels drawn per held-out sequence."""
    bound: Literal["always", "last"] = "always"
    """Evaluations in training that give the strict bound too, in 2 to 3 times the time: always, or last."""


@section(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """A whole recipe."""

    run: Run
    diffusion: Diffusion = field(default_factory=Diffusion)
    model: Model
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    data: Data
    optimizer: Optimizer
    lr_schedule: LrSchedule
    train: Train
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    evaluation: Evaluation = field(default_factory=Evaluation)
    sampling: Sampler = field(default_factory=AncestralSampler)

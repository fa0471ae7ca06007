"""Recipes that contradict themselves: changes of a sound one, what the message names, what mends it."""

import pytest

FP8 = {"precision.fp8": "hybrid", "precision.dtype": "bfloat16"}
OFFLOAD = {"cpu_offloading": True, "cpu_offloading_num_layers": 1}
GRAPHS = {"model.mcore": {"cuda_graph_impl": "local"}}
ODD_SLICES = {"precision.dtype": "bfloat16", "data.seq_length": 18, "parallel.context_parallel_size": 2}
WSD = {"kind": "wsd", "warmup_steps": 10, "decay_steps": 11}

CONTRADICTIONS = [
    pytest.param(
        {"train.rampup_batch_size": [4, 3, 100]},
        ["train.rampup_batch_size=[4, 3, 100]", "whole increments", "train.global_batch_size=8"],
        {"train.rampup_batch_size": [4, 2, 100]},
        id="ramp of batches",
    ),
    pytest.param(
        {"model.autoregressive": True, "sampling.kind": "left_to_right"},
        ["model.autoregressive=true", "diffusion.uniform_ratio=0.1"],
        {"diffusion.uniform_ratio": 0.0},
        id="noise of an autoregressive model",
    ),
    pytest.param(
        {"model.autoregressive": True, "diffusion.uniform_ratio": 0.0},
        ["model.autoregressive=true", "sampling.kind=ancestral"],
        {"sampling.kind": "left_to_right"},
        id="sampler of an autoregressive model",
    ),
    *(
        pytest.param(
            {
                "model.autoregressive": True,
                "diffusion.uniform_ratio": 0.0,
                "sampling.kind": "left_to_right",
                f"sampling.{knob}": value,
            },
            ["model.autoregressive=true", f"sampling.{knob}={value}"],
            {f"sampling.{knob}": without},
            id=f"{knob} of an autoregressive model",
        )
        for knob, value, without in (("guidance_scale", 2.0, 0.0), ("block_size", 4, None))
    ),
    pytest.param(
        {
            "model.autoregressive": True,
            "diffusion.uniform_ratio": 0.0,
            "sampling.kind": "left_to_right",
            "parallel.context_parallel_size": 2,
        },
        ["model.autoregressive=true", "parallel.context_parallel_size=2"],
        {"parallel.context_parallel_size": 1},
        id="slices of an autoregressive model",
    ),
    pytest.param(
        {"model.hidden_size": 30},
        ["model.hidden_size=30", "model.num_attention_heads=4"],
        {"model.kv_channels": 8},
        id="width of heads",
    ),
    pytest.param(
        {"model.hidden_size": 36},
        ["model.hidden_size=36", "model.num_attention_heads=4", "width 9", "even"],
        {"model.kv_channels": 10},
        id="odd width",
    ),
    pytest.param(
        {"model.kv_channels": 7}, ["model.kv_channels=7", "even"], {"model.kv_channels": 8}, id="odd heads"
    ),
    pytest.param(
        {"model.num_query_groups": 3},
        ["model.num_attention_heads=4", "model.num_query_groups=3"],
        {"model.num_query_groups": 2},
        id="groups of heads",
    ),
    pytest.param(
        {"diffusion.time_per": "document", "data.packing": "padded"},
        ["diffusion.time_per=document", "data.packing=padded"],
        {"diffusion.time_per": "document", "data.packing": "documents"},
        id="times of documents",
    ),
    pytest.param(
        {"data.packing": "documents", "model.mcore": {"apply_rope_fusion": True}},
        ["model.mcore.apply_rope_fusion=true", "data.packing=documents"],
        {"data.packing": "stream", "model.mcore": {"apply_rope_fusion": True}},
        id="fused rotary positions",
    ),
    pytest.param(
        {"diffusion.uniform_ratio": 1e-13},
        ["diffusion.uniform_ratio=1e-13", "at least 1e-12"],
        {"diffusion.uniform_ratio": 0},
        id="ratio below float32",
    ),
    pytest.param(
        {"data.mask_id": 100},
        ["data.mask_id=100", "data.vocab_size=100"],
        {"data.vocab_size": 101},
        id="mask outside",
    ),
    pytest.param(
        {"model.mcore": {"num_layers": 3}},
        ["model.mcore.num_layers", "set model.num_layers"],
        {"model.mcore": {}},
        id="knob by the back door",
    ),
    pytest.param(
        {"model.mcore": {"normalization": "LayerNorm"}},
        ["model.mcore.normalization", "RMSNorm", "remove it"],
        {"model.mcore": {"recompute_granularity": "full"}},
        id="fixed by the back door",
    ),
    pytest.param(
        {"parallel.tensor_model_parallel_size": 8, "model.kv_channels": 8},
        ["model.num_attention_heads=4", "parallel.tensor_model_parallel_size=8"],
        {"model.num_attention_heads": 8},
        id="heads over processes",
    ),
    pytest.param(
        {"parallel.tensor_model_parallel_size": 2, "model.num_query_groups": 1},
        ["model.num_query_groups=1", "parallel.tensor_model_parallel_size=2"],
        {"model.num_query_groups": 2},
        id="groups over processes",
    ),
    pytest.param(
        {"parallel.tensor_model_parallel_size": 2, "model.ffn_hidden_size": 65},
        ["model.ffn_hidden_size=65", "parallel.tensor_model_parallel_size=2"],
        {"model.ffn_hidden_size": 66},
        id="MLP over processes",
    ),
    pytest.param(
        {"parallel.virtual_pipeline_model_parallel_size": 2},
        ["parallel.virtual_pipeline_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1"],
        {"parallel.pipeline_model_parallel_size": 2},
        id="chunks without stages",
    ),
    pytest.param(
        {"parallel.pipeline_model_parallel_size": 3},
        ["model.num_layers=4", "parallel.pipeline_model_parallel_size=3"],
        {"model.num_layers": 6},
        id="layers over stages",
    ),
    pytest.param(
        {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 4},
        ["model.num_layers=4", "8 pipeline chunks", "virtual 4"],
        {"parallel.virtual_pipeline_model_parallel_size": 2},
        id="layers over chunks",
    ),
    pytest.param(
        {"parallel.sequence_parallel": True},
        ["parallel.sequence_parallel=true", "parallel.tensor_model_parallel_size=1"],
        {"parallel.tensor_model_parallel_size": 2},
        id="sequence parallel alone",
    ),
    pytest.param(
        {"parallel.sequence_parallel": True, "parallel.tensor_model_parallel_size": 2, "data.seq_length": 15},
        ["data.seq_length=15", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        {"data.seq_length": 14},
        id="sequence over processes",
    ),
    pytest.param(
        {"parallel.context_parallel_size": 3},
        ["data.seq_length=16", "parallel.context_parallel_size=3"],
        {"data.seq_length": 15},
        id="sequence over slices",
    ),
    pytest.param(
        {"checkpoint.keep_every": 1500},
        ["checkpoint.keep_every=1500", "checkpoint.save_interval=1000"],
        {"checkpoint.save_interval": 500},
        id="kept checkpoints that are never written",
    ),
    pytest.param(
        {"sampling.kind": "remdm_loop", "sampling.t_on": 0.2, "sampling.t_off": 0.3},
        ["sampling.t_off=0.3", "sampling.t_on=0.2"],
        {"sampling.t_on": 0.4},
        id="a loop that ends before it begins",
    ),
    pytest.param(
        {"lr_schedule.warmup_steps": 20},
        ["lr_schedule.warmup_steps=20", "train.num_steps=20"],
        {"lr_schedule.warmup_steps": 19},
        id="warm-up to the end",
    ),
    pytest.param(
        {"lr_schedule": WSD},
        ["lr_schedule.warmup_steps=10", "lr_schedule.decay_steps=11", "train.num_steps=20"],
        {"lr_schedule": {**WSD, "decay_steps": 10}},
        id="decay before the warm-up ends",
    ),
    pytest.param(
        {"lr_schedule.min_lr": 0.1},
        ["lr_schedule.min_lr=0.1", "optimizer.lr=0.001"],
        {"optimizer.lr": 0.1},
        id="lowest rate above the highest",
    ),
    pytest.param(
        {"train.micro_batch_size": 3},
        ["train.global_batch_size=8", "train.micro_batch_size=3"],
        {"train.global_batch_size": 9},
        id="micro-batches",
    ),
    pytest.param(
        {"train.stop_after_step": 20},
        ["train.stop_after_step=20", "train.num_steps=20"],
        {"train.stop_after_step": 19},
        id="stop at the end",
    ),
    pytest.param(
        {"precision.fp8_param_gather": True},
        ["precision.fp8_param_gather=True", "no effect without precision.fp8"],
        FP8,
        id="FP8 weights without FP8",
    ),
    pytest.param(
        {"model.mcore": {"fp8_dot_product_attention": True}},
        ["model.mcore.fp8_dot_product_attention", "no effect without precision.fp8"],
        FP8,
        id="FP8 attention without FP8",
    ),
    pytest.param(
        FP8 | {"precision.dtype": "float32"},
        ["precision.fp8=hybrid", "precision.dtype=bfloat16", "float32"],
        FP8,
        id="FP8 over float32",
    ),
    pytest.param(
        FP8 | {"model.mcore": {"fp8_margin": 1}},
        ["model.mcore.fp8_margin", "precision.fp8_recipe=tensorwise", "take delayed"],
        {"precision.fp8_recipe": "delayed"},
        id="margin of a scale that is not delayed",
    ),
    pytest.param(
        FP8 | {"precision.fp8_recipe": "delayed", "precision.num_layers_at_end_in_bf16": 1},
        ["precision.fp8_recipe=delayed", "num_layers_at_end_in_bf16=1", "take tensorwise"],
        {"precision.fp8_recipe": "tensorwise"},
        id="delayed scales with layers left out",
    ),
    pytest.param(
        FP8 | {"precision.num_layers_at_start_in_bf16": 3, "precision.num_layers_at_end_in_bf16": 1},
        ["precision.num_layers_at_start_in_bf16=3", "num_layers_at_end_in_bf16=1", "model.num_layers=4"],
        {"precision.num_layers_at_start_in_bf16": 2},
        id="no layer in FP8",
    ),
    pytest.param(
        FP8 | {"precision.fp8_param_gather": True, "optimizer.use_distributed_optimizer": False},
        ["precision.fp8_param_gather=true", "optimizer.use_distributed_optimizer=true"],
        {"optimizer.use_distributed_optimizer": True},
        id="FP8 weights without float32 ones",
    ),
    pytest.param(
        FP8 | {"precision.fp8_param_gather": True, "precision.fp8_recipe": "mxfp8", "data.seq_length": 32},
        ["precision.fp8_param_gather=true", "precision.fp8_recipe=mxfp8"],
        {"precision.fp8_recipe": "blockwise"},
        id="gathered blocks of 32",
    ),
    pytest.param(
        FP8 | {"model.ffn_hidden_size": 72},
        ["model.ffn_hidden_size=72", "multiple of 16", "precision.fp8_recipe=tensorwise", "64 or 80"],
        {"model.ffn_hidden_size": 80},
        id="MLP in FP8",
    ),
    pytest.param(
        FP8
        | {"model.num_query_groups": 1, "parallel.tensor_model_parallel_size": 1, "model.kv_channels": 12},
        ["model.num_attention_heads=4 of width 12", "72 with keys and values", "64 or 80"],
        {"model.num_query_groups": 2},
        id="heads in FP8",
    ),
    pytest.param(
        FP8 | {"data.seq_length": 24},
        ["data.seq_length=24", "multiple of 16", "16 or 32"],
        {"data.seq_length": 32},
        id="sequence in FP8",
    ),
    pytest.param(
        FP8 | {"data.seq_length": 48, "parallel.context_parallel_size": 2},
        ["data.seq_length=48 over parallel.context_parallel_size=2", "multiple of 16", "32 or 64"],
        {"data.seq_length": 64},
        id="sequence in FP8 over slices",
    ),
    pytest.param(
        FP8
        | {
            "data.seq_length": 48,
            "parallel.tensor_model_parallel_size": 2,
            "parallel.sequence_parallel": True,
        },
        [
            "data.seq_length=48 over parallel.tensor_model_parallel_size=2 with parallel.sequence_parallel",
            "multiple of 16",
            "32 or 64",
        ],
        {"data.seq_length": 64},
        id="sequence in FP8 over sequence-parallel ranks",
    ),
    pytest.param(
        FP8 | {"model.transformer_impl": "local"},
        ["precision.fp8=hybrid", "model.transformer_impl=local"],
        {"model.transformer_impl": "auto"},
        id="FP8 by PyTorch",
    ),
    pytest.param(
        {"model.mcore": {"tp_comm_overlap": True}, "parallel.tensor_model_parallel_size": 2},
        ["model.mcore.tp_comm_overlap=true", "parallel.sequence_parallel=true"],
        {"parallel.sequence_parallel": True},
        id="overlapped messages that are not sent",
    ),
    pytest.param(
        ODD_SLICES | {"model.transformer_impl": "transformer_engine"},
        ["data.seq_length=18 over parallel.context_parallel_size=2", "even", "=transformer_engine"],
        {"data.seq_length": 20},
        id="odd slices",
    ),
    pytest.param(
        ODD_SLICES,
        ["data.seq_length=18 over parallel.context_parallel_size=2", "model.transformer_impl=auto"],
        {"model.transformer_impl": "local"},
        id="odd slices where auto may take Transformer Engine",
    ),
    pytest.param(
        {"train.fuse_head": "always", "parallel.overlap_grad_reduce": True},
        ["train.fuse_head=always", "parallel.overlap_grad_reduce=true"],
        {"train.fuse_head": "auto"},
        id="a head that backward does not see",
    ),
    pytest.param(
        {"parallel.overlap_param_gather": True},
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"],
        {"parallel.overlap_grad_reduce": True},
        id="overlapped gather alone",
    ),
    pytest.param(
        {"model.mcore": OFFLOAD | {"recompute_granularity": "full"}},
        ["model.mcore.cpu_offloading=true", "model.mcore.recompute_granularity"],
        {"model.mcore": OFFLOAD},
        id="activations put away and computed again",
    ),
    pytest.param(
        {"model.mcore": {"cpu_offloading": True}},
        ["model.mcore.cpu_offloading=true", "cpu_offloading_num_layers of 1 or more", "set both"],
        {"model.mcore": OFFLOAD},
        id="no layer's activations put away",
    ),
    pytest.param(
        {"model.mcore": {"cuda_graph_impl": "transformer_engine"}},
        ["model.mcore.cuda_graph_impl=transformer_engine", "take local"],
        GRAPHS,
        id="graphs of another maker",
    ),
    pytest.param(
        {"optimizer.optimizer_offload_fraction": 0.5},
        ["optimizer.optimizer_offload_fraction=0.5", "optimizer.optimizer_cpu_offload=true"],
        {"optimizer.optimizer_cpu_offload": True, "precision.dtype": "bfloat16"},
        id="a share of nothing",
    ),
    pytest.param(
        {"optimizer.optimizer_cpu_offload": True},
        ["optimizer.optimizer_cpu_offload=true", "precision.dtype=bfloat16", "got float32"],
        {"precision.dtype": "bfloat16"},
        id="offload of float32",
    ),
    pytest.param(
        GRAPHS | {"parallel.pipeline_model_parallel_size": 2},
        ["model.mcore.cuda_graph_impl=local", "parallel.pipeline_model_parallel_size must be 1"],
        {"parallel.pipeline_model_parallel_size": 1},
        id="graphs in a pipeline",
    ),
    pytest.param(
        GRAPHS | {"model.hidden_dropout": 0.1},
        ["model.mcore.cuda_graph_impl=local", "model.hidden_dropout"],
        {"model.hidden_dropout": 0.0},
        id="graphs with dropout",
    ),
    pytest.param(
        GRAPHS | {"data.random_length_fraction": 0.01},
        ["model.mcore.cuda_graph_impl=local", "data.random_length_fraction=0.01"],
        {"data.packing": "documents"},
        id="graphs with a mask now and then",
    ),
    pytest.param(
        {"model.mcore": {"cuda_graph_impl": "local", "recompute_granularity": "full"}},
        ["model.mcore.cuda_graph_impl=local", "model.mcore.recompute_granularity"],
        GRAPHS,
        id="graphs with recomputation",
    ),
    pytest.param(
        {"tracking.mlflow": "sqlite:///x"},
        ["tracking.mlflow='sqlite:///x'", "'local'", "null"],
        {"tracking.mlflow": "https://host"},
        id="MLflow's place",
    ),
]

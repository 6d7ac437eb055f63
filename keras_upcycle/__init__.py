"""Sparse upcycling for Keras 3: a trained dense model becomes a mixture.

The names below are public; everything else may change without notice.
"""

import importlib.util as _importlib_util
import os as _os
import sys as _sys

from keras_upcycle import freed_memory as _freed_memory
from keras_upcycle.version import __version__ as __version__

_freed_memory.keep()  # before any backend has threads with heaps of their own

# `KERAS_BACKEND` chooses the backend; where it is unset, JAX if it is there.
# Keras reads the variable once, when it is first imported.
if "keras" not in _sys.modules and _importlib_util.find_spec("jax"):
    _os.environ.setdefault("KERAS_BACKEND", "jax")

# In the command's own process `cli` imports what it needs, module by module:
# `keras-upcycle --help` is not to wait for Keras.
_argv = _sys.argv or [""]
if _os.path.splitext(_os.path.basename(_argv[0]))[0] != "keras-upcycle":
    from keras_upcycle import distribution as distribution
    from keras_upcycle.analysis.active_experts import (
        ActiveExpertsReport as ActiveExpertsReport,
    )
    from keras_upcycle.analysis.active_experts import (
        measure_active_experts as measure_active_experts,
    )
    from keras_upcycle.analysis.assignments import (
        expert_assignments as expert_assignments,
    )
    from keras_upcycle.analysis.expert_page import (
        plot_expert_tokens as plot_expert_tokens,
    )
    from keras_upcycle.analysis.few_shot import FewShotResult as FewShotResult
    from keras_upcycle.analysis.few_shot import few_shot_probe as few_shot_probe
    from keras_upcycle.analysis.lm_eval_model import (
        lm_eval_model as lm_eval_model,
    )
    from keras_upcycle.analysis.router_plots import (
        plot_expert_assignments as plot_expert_assignments,
    )
    from keras_upcycle.analysis.router_plots import (
        plot_expert_load as plot_expert_load,
    )
    from keras_upcycle.conversion.adapters import (
        load_adapters as load_adapters,
    )
    from keras_upcycle.conversion.adapters import (
        save_adapters as save_adapters,
    )
    from keras_upcycle.conversion.adopt import adopt_model as adopt_model
    from keras_upcycle.conversion.attention_experts import (
        AttentionExperts as AttentionExperts,
    )
    from keras_upcycle.conversion.copied_attention import (
        CopiedAttention as CopiedAttention,
    )
    from keras_upcycle.conversion.densify import densify_model as densify_model
    from keras_upcycle.conversion.densify import (
        extract_expert as extract_expert,
    )
    from keras_upcycle.conversion.depth_tiling import tile_depth as tile_depth
    from keras_upcycle.conversion.estimate import (
        estimate_upcycle as estimate_upcycle,
    )
    from keras_upcycle.conversion.estimate_report import (
        UpcycleEstimate as UpcycleEstimate,
    )
    from keras_upcycle.conversion.grow import grow_experts as grow_experts
    from keras_upcycle.conversion.grow_report import (
        GrowthReport as GrowthReport,
    )
    from keras_upcycle.conversion.heads import find_attention as find_attention
    from keras_upcycle.conversion.heads import (
        upcycle_attention as upcycle_attention,
    )
    from keras_upcycle.conversion.memory_plan import MemoryPlan as MemoryPlan
    from keras_upcycle.conversion.merge import merge_experts as merge_experts
    from keras_upcycle.conversion.mixture_estimate import (
        MixtureEstimate as MixtureEstimate,
    )
    from keras_upcycle.conversion.mixture_estimate import (
        estimate_mixture as estimate_mixture,
    )
    from keras_upcycle.conversion.prune import prune_experts as prune_experts
    from keras_upcycle.conversion.prune_report import PruneReport as PruneReport
    from keras_upcycle.conversion.recipe import Recipe as Recipe
    from keras_upcycle.conversion.recipe import get_recipe as get_recipe
    from keras_upcycle.conversion.scaling_law import (
        UpcyclingPrediction as UpcyclingPrediction,
    )
    from keras_upcycle.conversion.scaling_law import (
        predict_upcycling as predict_upcycling,
    )
    from keras_upcycle.conversion.scratch import (
        mixture_from_scratch as mixture_from_scratch,
    )
    from keras_upcycle.conversion.upcycle import (
        find_feed_forwards as find_feed_forwards,
    )
    from keras_upcycle.conversion.upcycle import upcycle_model as upcycle_model
    from keras_upcycle.conversion.upcycle_optimizer import (
        upcycle_optimizer as upcycle_optimizer,
    )
    from keras_upcycle.conversion.usefulness import (
        expert_usefulness as expert_usefulness,
    )
    from keras_upcycle.conversion.verify import verify_upcycle as verify_upcycle
    from keras_upcycle.conversion.verify_report import (
        UpcycleReport as UpcycleReport,
    )
    from keras_upcycle.errors import UpcycleError as UpcycleError
    from keras_upcycle.export.export_model import can_export as can_export
    from keras_upcycle.export.export_model import export_model as export_model
    from keras_upcycle.export.reasons import ExportCheck as ExportCheck
    from keras_upcycle.families import AttentionSite as AttentionSite
    from keras_upcycle.families import Family as Family
    from keras_upcycle.families import FeedForwardSite as FeedForwardSite
    from keras_upcycle.families import register_block as register_block
    from keras_upcycle.families import register_family as register_family
    from keras_upcycle.layers.activations import (
        Float32Activation as Float32Activation,
    )
    from keras_upcycle.layers.expert_init import ExpertInit as ExpertInit
    from keras_upcycle.layers.moe_feed_forward import (
        MoEFeedForward as MoEFeedForward,
    )
    from keras_upcycle.layers.routed_heads import RoutedHeads as RoutedHeads
    from keras_upcycle.methods.active_experts import (
        set_active_experts as set_active_experts,
    )
    from keras_upcycle.methods.branch_train_mix import (
        BranchTrainMix as BranchTrainMix,
    )
    from keras_upcycle.methods.carving import Carving as Carving
    from keras_upcycle.methods.carving_router import (
        CarvingRouter as CarvingRouter,
    )
    from keras_upcycle.methods.default_moe import (
        DefaultMoERouter as DefaultMoERouter,
    )
    from keras_upcycle.methods.drop_upcycling import (
        DropUpcycling as DropUpcycling,
    )
    from keras_upcycle.methods.drop_upcycling import RandomNoise as RandomNoise
    from keras_upcycle.methods.ds_moe import DSMoERouter as DSMoERouter
    from keras_upcycle.methods.expert_weights import (
        ExpertWeights as ExpertWeights,
    )
    from keras_upcycle.methods.feed_forward_slices import (
        FeedForwardSlices as FeedForwardSlices,
    )
    from keras_upcycle.methods.low_rank_experts import (
        LowRankExperts as LowRankExperts,
    )
    from keras_upcycle.methods.qwen2_moe import (
        ReplicateShuffleCut as ReplicateShuffleCut,
    )
    from keras_upcycle.methods.random_experts import (
        RandomExperts as RandomExperts,
    )
    from keras_upcycle.methods.shared_experts import (
        SharedExperts as SharedExperts,
    )
    from keras_upcycle.methods.skywork import SkyworkRouter as SkyworkRouter
    from keras_upcycle.methods.upit.assembly import UpIT as UpIT
    from keras_upcycle.methods.upit.buckets import (
        perplexity_buckets as perplexity_buckets,
    )
    from keras_upcycle.methods.upit.checkpoints import (
        ExpertCheckpoints as ExpertCheckpoints,
    )
    from keras_upcycle.methods.upit.expansion import (
        expand_experts as expand_experts,
    )
    from keras_upcycle.methods.upit.pipeline import upit_upcycle as upit_upcycle
    from keras_upcycle.methods.upit.routing_vectors import (
        routing_vectors as routing_vectors,
    )
    from keras_upcycle.methods.virtual_groups import (
        VirtualGroups as VirtualGroups,
    )
    from keras_upcycle.optimizers.per_expert import per_expert as per_expert
    from keras_upcycle.optimizers.scaled_optimizer import (
        scale_gradients as scale_gradients,
    )
    from keras_upcycle.optimizers.scaled_optimizer import (
        scale_learning_rate as scale_learning_rate,
    )
    from keras_upcycle.routing.expert_choice_router import (
        ExpertChoiceRouter as ExpertChoiceRouter,
    )
    from keras_upcycle.routing.router import Router as Router
    from keras_upcycle.routing.statistics import RouterReading as RouterReading
    from keras_upcycle.routing.top_k_router import TopKRouter as TopKRouter
    from keras_upcycle.training.dropout import DropoutReport as DropoutReport
    from keras_upcycle.training.dropout import set_dropout as set_dropout
    from keras_upcycle.training.freezing import freeze as freeze
    from keras_upcycle.training.freezing import unfreeze as unfreeze
    from keras_upcycle.training.router_monitor import (
        RouterMonitor as RouterMonitor,
    )
    from keras_upcycle.training.router_writers import (
        TensorBoardWriter as TensorBoardWriter,
    )
    from keras_upcycle.training.router_writers import (
        WandbWriter as WandbWriter,
    )
    from keras_upcycle.training.schedules import (
        InverseSquareRoot as InverseSquareRoot,
    )

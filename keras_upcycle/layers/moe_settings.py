"""The settings of `MoEFeedForward`: which go together, and what files hold."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_upcycle import checks, keras_internals
from keras_upcycle.layers import dispatch
from keras_upcycle.layers.activations import activation_of as activation_of
from keras_upcycle.layers.expert_files import FORMAT, read_settings
from keras_upcycle.layers.expert_init import SHARED
from keras_upcycle.routing.registry import (
    check_is_free,
    get_router,
    in_config,
)
from keras_upcycle.routing.router import Router

AUTO = "auto"


class SettingsInFiles(keras.layers.Layer):
    """A `MoEFeedForward`'s config, and back."""

    @classmethod
    def from_config(cls, config):
        return super().from_config(read_settings(config))

    def get_config(self):
        return {
            **super().get_config(),
            **self.saved_settings(),
            "dtype": keras.dtype_policies.serialize(
                keras_internals.policy_of_tree(self)
            ),
        }

    def saved_settings(self) -> dict[str, Any]:
        """`settings`, and what their names mean: `read_settings`."""
        return {**self.settings(), "format": FORMAT}

    def settings(self) -> dict[str, Any]:
        """The arguments that make an equal layer, less name and dtype."""
        return {
            "num_experts": self.num_experts,
            "intermediate_dim": self.intermediate_dim,
            "router": in_config(self.router),
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "output_bias": self.output_bias is not None,
            "dropout": self.dropout,
            "output_dropout": self.output_dropout,
            "shared_intermediate_dim": self.shared_intermediate_dim,
            "shared_gate": self.shared_gate is not None,
            "low_rank": self.low_rank,
            "low_rank_alpha": self.low_rank_alpha,
            "dispatch": self.dispatch,
            "trainable_experts": self.experts.trainable,
            "frozen_projections": self.experts.frozen_projections,
            "remat": self.remat,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
            **self._quantization_settings(),
        }

    def _quantization_settings(self):
        configs = dict(self.experts.quantization_configs)
        if self.shared is not None:
            for role, config in self.shared.quantization_configs.items():
                configs[SHARED + role] = config
        return {"quantization_configs": configs} if configs else {}


def check_dispatch(name: Any) -> str:
    """Raises `ValueError` unless an engine, or `"auto"`, has that name."""
    return checks.check_choice("dispatch", name, (AUTO, *dispatch.ENGINES))


def check_output_bias(output_bias: bool, use_bias: bool) -> None:
    """Raises `ValueError` for one bias of all where there are none."""
    if output_bias and not use_bias:
        raise ValueError(
            "`output_bias` takes the place of the experts' output biases, "
            f"so it needs `use_bias=True`. Received: output_bias="
            f"{output_bias!r} and use_bias={use_bias!r}. Leave one of them out."
        )


def check_shared_gate(shared_gate: bool, width: int | None) -> None:
    """Raises for what is no boolean, and for a gate of nothing."""
    if checks.check_flag("shared_gate", shared_gate) and width is None:
        raise ValueError(
            "`shared_gate` multiplies what a shared network puts out, so it "
            "needs `shared_intermediate_dim`. Received: shared_gate=True and "
            "shared_intermediate_dim=None. Leave it out, or pass a width."
        )


def check_low_rank(rank: Any, alpha: Any) -> tuple[int | None, float | None]:
    """Raises for what is no rank, and for a scale of none."""
    if rank is not None:
        rank = checks.check_count("low_rank", rank)
    if alpha is not None:
        alpha = checks.check_factor("low_rank_alpha", alpha)
        if rank is None:
            raise ValueError(
                "`low_rank_alpha` scales what low-rank experts add, so it "
                f"needs `low_rank`. Received: low_rank_alpha={alpha} and "
                "low_rank=None. Leave it out, or pass a rank."
            )
    return rank, alpha


def check_frozen_projections(frozen_projections: Any, gated: bool) -> None:
    """Raises for what is no list of the roles that experts have."""
    roles = _roles(gated)
    checks.check_instance(
        "frozen_projections",
        frozen_projections,
        list | tuple,
        f"a list of some of {roles}",
    )
    for role in frozen_projections:
        checks.check_choice("frozen_projections", role, roles)


def check_quantization_configs(configs: Any, gated: bool) -> Mapping[str, Any]:
    """Raises for what is no mapping from the roles that networks have."""
    if configs is None:
        return {}
    roles = _roles(gated)
    roles = (*roles, *(SHARED + role for role in roles))
    checks.check_instance(
        "quantization_configs", configs, Mapping, f"a mapping from {roles}"
    )
    for role in configs:
        checks.check_choice("quantization_configs", role, roles)
    return configs


def _roles(gated):
    return ("up", "gate", "down") if gated else ("up", "down")


def adopted(router: Any, num_experts: int) -> Router:
    """The router that is meant, for a layer of so many experts.

    Raises:
        ValueError: If another layer holds it.
    """
    named = isinstance(router, str)
    found = get_router(router)
    if named:
        found.limit(num_experts)
    check_is_free(found, "`MoEFeedForward`")
    return found


def of_experts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is named by role, what is of the experts."""
    return {n: v for n, v in values.items() if not n.startswith(SHARED)}


def of_shared(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is named by role, what is of the shared network."""
    return {
        name.removeprefix(SHARED): value
        for name, value in values.items()
        if name.startswith(SHARED)
    }

"""Experts of two layers each, as stacked parameters, and from and to a list of modules."""

from typing import Any

import torch
from torch import Tensor, nn

from m2ae_kernels.ops._activations import activation_id, is_glu
from m2ae_kernels.ops._moe_routing import MoERouting
from m2ae_kernels.ops.expert_mlp import expert_mlp


class GroupedExperts(nn.Module):
    """E times: linear, activation, dropout, linear, output activation, dropout; by expert_mlp.

    Parameters are w1 [E, H, D] ([E, 2 H, D] for a gated activation, gate rows first), b1, w2
    [E, Do, H] and b2 [E, Do], drawn as E pairs of nn.Linear. Dropout is in training mode alone.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: H.
        out_dim: Do; None is D.
        bias: whether there are b1 and b2.
        activation: "gelu" (exact), "gelu_tanh", "relu", "relu2", "silu", "identity", "swiglu",
            "geglu" or "reglu".
        output_activation: one of those that are not gated.
        dropout_p: of hidden values, in [0, 1).
        output_dropout_p: of each expert's outputs, in [0, 1).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an activation is not as above.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        out_dim: int | None = None,
        *,
        bias: bool = True,
        activation: str = "gelu",
        output_activation: str = "identity",
        dropout_p: float = 0.0,
        output_dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden_dim = num_experts, dim, hidden_dim
        self.out_dim = dim if out_dim is None else out_dim
        self.activation, self.output_activation = activation, output_activation
        self.dropout_p, self.output_dropout_p = dropout_p, output_dropout_p
        activation_id("GroupedExperts", "output_activation", output_activation, glu=False)
        gated = is_glu(activation_id("GroupedExperts", "activation", activation))
        rows = 2 * hidden_dim if gated else hidden_dim
        placed: dict[str, Any] = {"device": device, "dtype": dtype}

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, **placed))

        self.w1, self.w2 = parameter(rows, dim), parameter(self.out_dim, hidden_dim)
        self.b1 = parameter(rows) if bias else None
        self.b2 = parameter(self.out_dim) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each layer's weight and bias from U(-n^-1/2, n^-1/2), n being its inputs."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = max(weight.shape[2], 1) ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        routing: MoERouting | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of what each row's experts say.

        Args:
            x: [T, D].
            topk_weights: [R, k] float32; R = T, or S T with `shift`.
            topk_ids: [R, k]; -1 is skipped.
            routing: what moe_sort returned for `topk_ids`, if at hand.
            shift: [S, D]: row s T + t is of x[t] + shift[s].

        Returns:
            [R, Do].
        """
        return expert_mlp(
            x,
            self.w1,
            self.w2,
            topk_weights,
            topk_ids,
            b1=self.b1,
            b2=self.b2,
            activation=self.activation,
            output_activation=self.output_activation,
            dropout_p=self.dropout_p if self.training else 0.0,
            output_dropout_p=self.output_dropout_p if self.training else 0.0,
            routing=routing,
            shift=shift,
        )

    @classmethod
    def from_modulelist(cls, experts: nn.ModuleList) -> "GroupedExperts":
        """The same experts, stacked; their parameters are copied.

        Args:
            experts: modules of one shape, each of which is, within whatever containers, linear,
                activation, linear, with a dropout behind the activation or none, and another
                activation and a dropout at the end or none: as in M3-JEPA.

        Raises:
            ValueError: there is no expert, or one is built otherwise, or unlike the first.
        """
        layers = [_layers_of(i, expert) for i, expert in enumerate(experts)]
        if not layers:
            raise ValueError("GroupedExperts: expected at least one expert, got none")
        first, second, options = layers[0]
        expected = _shape(*layers[0])
        if (first.bias is None) != (second.bias is None):
            raise ValueError(
                f"GroupedExperts: expected biases in both layers or none, got {expected}"
            )
        for i, of_expert in enumerate(layers):
            if (found := _shape(*of_expert)) != expected:
                raise ValueError(
                    f"GroupedExperts: expected experts like the first, {expected}; expert {i} is"
                    f" {found}"
                )
        grouped = cls(
            len(layers),
            first.in_features,
            first.out_features,
            second.out_features,
            bias=first.bias is not None,
            **options,
            device=first.weight.device,
            dtype=first.weight.dtype,
        )
        with torch.no_grad():
            for i, (w1, w2, _) in enumerate(layers):
                grouped.w1[i], grouped.w2[i] = w1.weight, w2.weight
                if grouped.b1 is not None and grouped.b2 is not None:
                    grouped.b1[i], grouped.b2[i] = w1.bias, w2.bias
        return grouped.train(experts.training)

    def to_modulelist(self) -> nn.ModuleList:
        """As nn.Sequential each: linear, activation, dropout, linear, [activation,] dropout.

        Raises:
            ValueError: the activation is gated, or relu2, which are no modules of torch.
        """
        if self.activation not in MODULES or self.output_activation not in MODULES:
            raise ValueError(
                f"GroupedExperts: expected activations among {sorted(MODULES)}, which torch has as"
                f" modules, got {self.activation} and {self.output_activation}"
            )
        experts = nn.ModuleList()
        for i in range(self.num_experts):
            layers = []
            for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
                placed: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
                linear = nn.Linear(weight.shape[2], weight.shape[1], bias is not None, **placed)
                with torch.no_grad():
                    linear.weight.copy_(weight[i])
                    if bias is not None:
                        linear.bias.copy_(bias[i])
                layers.append(linear)
            last = [] if self.output_activation == "identity" else [_module(self.output_activation)]
            hidden = (_module(self.activation), nn.Dropout(self.dropout_p))
            experts.append(
                nn.Sequential(
                    layers[0], *hidden, layers[1], *last, nn.Dropout(self.output_dropout_p)
                )
            )
        return experts.train(self.training)

    def extra_repr(self) -> str:
        names = ["num_experts", "dim", "hidden_dim", "out_dim", "activation", "output_activation"]
        names += ["dropout_p", "output_dropout_p"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


MODULES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "gelu": (nn.GELU, {}),
    "gelu_tanh": (nn.GELU, {"approximate": "tanh"}),
    "relu": (nn.ReLU, {}),
    "silu": (nn.SiLU, {}),
    "identity": (nn.Identity, {}),
}


def _module(activation: str) -> nn.Module:
    kind, options = MODULES[activation]
    return kind(**options)


def _name(module: nn.Module) -> str | None:
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return next((name for name, (kind, _) in MODULES.items() if type(module) is kind), None)


def _layers_of(i: int, expert: nn.Module) -> tuple[nn.Linear, nn.Linear, dict[str, Any]]:
    """Both layers of expert i, and the options that its other modules mean."""
    leaves = [module for module in expert.modules() if not list(module.children())]
    rest = list(leaves)
    first = _take(rest, nn.Linear)
    activation = _name(rest[0]) if rest else None
    rest = rest[1:] if activation else rest
    dropout = _take(rest, nn.Dropout)
    second = _take(rest, nn.Linear)
    output_activation = _name(rest[0]) if rest else None
    rest = rest[1:] if output_activation else rest
    output_dropout = _take(rest, nn.Dropout)
    if first is None or activation is None or second is None or rest:
        names = [type(module).__name__ for module in leaves]
        raise ValueError(
            "GroupedExperts: expected Linear, activation, [Dropout,] Linear, [activation,]"
            f" [Dropout]; expert {i} is {names}"
        )
    return first, second, {
        "activation": activation,
        "output_activation": output_activation or "identity",
        "dropout_p": 0.0 if dropout is None else dropout.p,
        "output_dropout_p": 0.0 if output_dropout is None else output_dropout.p,
    }  # fmt: skip


def _take(modules: list[nn.Module], kind: type[Any]) -> Any:
    """The first of them, if it is of the kind; it is taken off the list."""
    return modules.pop(0) if modules and type(modules[0]) is kind else None


def _shape(first: nn.Linear, second: nn.Linear, options: dict[str, Any]) -> str:
    return (
        f"{list(first.weight.shape)} and {list(second.weight.shape)}, biases"
        f" {first.bias is not None} and {second.bias is not None}, {options}"
    )

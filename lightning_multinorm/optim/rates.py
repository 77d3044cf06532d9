"""Learning rates of groups: factors by kind of layer, and what a rate tuned on a narrow model becomes on a wide one."""

from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam

from lightning_multinorm.optim.base import MultiNormOptimizer
from lightning_multinorm.optim.groups import Group

_ADAMS = (Adam, AdamW, NAdam, RAdam)


def apply_lr_factors(optimizer: Optimizer) -> None:
    """Multiply rates by the "lr_factor" of groups from ``parameter_groups(..., lr_scales=...)``, once.

    `SinkGD`, `SWAN` and `MultiNormGD` do it when they are built. Any other optimizer would leave the key alone, and is
    to be given here as soon as it is built, before its scheduler is.

    Raises:
        ValueError: for an optimizer whose groups have no rate.
    """
    for group in optimizer.param_groups:
        factor = group.pop("lr_factor", 1.0)
        if factor != 1:
            _multiply(optimizer, group, factor)


def transfer_rates(optimizer: Optimizer, ratio: float) -> None:
    """Give a model ``ratio`` times as wide as the one that ``lr`` was tuned on the rates of the same dynamics.

    As μP has it for Adam, in the form for the usual initialisation (arXiv:2203.03466, Table 3; arXiv:2407.05872):
    the rate of hidden matrices and of the output head falls with 1 / width, that of embedding, norms and biases stays.
    A hidden matrix whose update is set by the optimizer's own rule follows that: SinkGD's falls with 1 / width too,
    since the spectral norm of updates with entries of RMS 1 grows with the width where they are aligned; SWAN's and
    MultiNormGD's with a spectral norm by 1 / √width, since theirs grows so; SinkGD's with ``rescale="operator"`` not
    at all, since there the norm is what the rate sets (its head is still scaled).

    Args:
        optimizer: just built, from `parameter_groups`; SinkGD, SWAN, MultiNormGD, or an Adam of torch.
        ratio: the width over that of the tuned model.

    Raises:
        ValueError: for another optimizer, or groups that do not name their kind.
    """
    known = isinstance(optimizer, (MultiNormOptimizer, *_ADAMS))
    if not known:
        raise ValueError(
            f"base_width: how the rate of {type(optimizer).__name__} depends on the width is not known; use SinkGD, "
            "SWAN, MultiNormGD or AdamW, or give the factors by lr_scales"
        )
    for group in optimizer.param_groups:
        kind = str(group.get("name", "")).partition("-")[0]
        if kind not in ("matrix", "embedding", "head", "norm", "bias"):
            raise ValueError("base_width: the groups do not name their kind; take them from parameter_groups(model)")
        exponent = 1.0 if kind in ("matrix", "head") else 0.0
        if isinstance(optimizer, MultiNormOptimizer) and group["rule"] == "multinorm" and exponent:
            exponent = optimizer.width_exponent
        _multiply(optimizer, group, ratio**-exponent)


def _multiply(optimizer: Optimizer, group: Group, factor: float) -> None:
    key = "lr_scale" if isinstance(optimizer, MultiNormOptimizer) else "lr"
    if key not in group:
        raise ValueError(
            f"lr_scales: {type(optimizer).__name__} has no learning rate to scale in its groups; leave lr_scales away"
        )
    group[key] = group[key] * factor

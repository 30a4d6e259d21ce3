"""Which layer's memory lives where: the most resident placement that budgets allow, or which of them forbids any.

    device    records of the first layers, then working weights of the next, then activations of those (no recompute)
    host      working weights of all others, then records of the next layers
    disk      the other records, and working weights that the host has no room for

Weights that are only read are their records: they live in one place alone, the host or the disk.

Every kind is given to a prefix of the walk: the optimizer runs in forward order just ahead of the weights' stream, so
the first layers are the ones that nothing has hidden yet. Between everything on the device and nothing, each layer is
one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cgpt.errors import InputError
from cgpt.stream.account import Account, account, boundary_bytes
from cgpt.stream.format import Format
from cgpt.stream.layout import LayerPlan
from cgpt.stream.limits import Budgets, bytes_text
from cgpt.stream.placement import Placement


@dataclass(frozen=True)
class Setting:
    """How a step is walked: `visits` of all layers by `micro_batches` of `micro_batch_tokens` tokens, with activations
    `width` wide between layers. beside: the tier of torch's own memory (account.py), `cache` bytes of it for keys and
    values. ranks: devices that share the step; visits, micro_batches and budgets are of each."""

    format: Format
    micro_batch_tokens: int
    width: int
    micro_batches: int = 1
    visits: int = 1
    beside: str = "device"
    cache: int = 0
    ranks: int = 1


class DoesNotFit(InputError):
    """No placement fits. limit: "device", "host" or "disk"; wanted: the least bytes of it that would do with the other
    budgets as they are, and what for (parts); given: the budget. disk: bytes of disk that would do instead, where some
    would."""

    def __init__(self, limit: str, wanted: int, given: int, parts: dict[str, int], disk: int | None = None):
        self.limit, self.wanted, self.given, self.parts, self.disk = limit, wanted, given, parts, disk
        what = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items())
        super().__init__(
            f"{limit} memory: wanted at least {bytes_text(wanted, up=True)} ({what}), got {bytes_text(given)}"
        )


def place(
    plans: Sequence[LayerPlan],
    budgets: Budgets,
    setting: Setting,
    *,
    activations: str | None = None,
    most_state: int | None = None,
    most_weights: int | None = None,
) -> Placement:
    """The most resident placement within `budgets`. Raises DoesNotFit where there is none.

    activations: "device" or "host" (default: the device if that fits). most_state, most_weights: keep no more layers'
    records, or working weights, on the device than that, though there be room.
    """
    kinds = (activations,) if activations else ("device", "host")
    for kind in kinds:
        found = _Search(plans, budgets, setting, kind).best(most_state, most_weights)
        if found is not None:
            return found
    raise _refusal(plans, budgets, setting, kinds)


@dataclass
class _Search:
    """Placements of one kind, as five counts: layers from the front whose (1) record is on the device, (2) and then on
    the host, (3) the rest's weights on the host before the disk, (4) weights on the device, (5) activations kept."""

    plans: Sequence[LayerPlan]
    budgets: Budgets
    setting: Setting
    activations: str
    _known: dict[tuple[int, ...], Account] = field(default_factory=dict)

    def best(self, most_state: int | None, most_weights: int | None) -> Placement | None:
        n = len(self.plans)
        state = self.most_state(n if most_state is None else most_state)
        if state is None:
            return None
        kept = self.least_kept(state)
        split = self._split(state, kept)
        if split is None:
            return None
        host, near = split
        edge = min(state + host + near, n if most_weights is None else max(most_weights, kept))
        kept = _most(kept, edge, lambda k: self.fits(state, host, near, k)) or kept
        plain = _most(0, kept, lambda k: self.fits(state, host, near, kept, k)) or 0
        return self.placement(state, host, near, kept, plain)

    def most_state(self, most: int) -> int | None:
        """How many layers' records the device holds; None where it does not even hold what streaming takes."""
        n = len(self.plans)
        return _most(0, min(most, n), lambda k: self.fits_device(k, n - k, 0, self.least_kept(k)))

    def least_kept(self, state: int) -> int:
        """A first layer much larger than the others takes less room when it is kept than two slots of its size do."""
        n = len(self.plans)
        return min((state, max(state, 1)), key=lambda k: self.account(state, n - state, 0, k).device)

    def _split(self, state: int, kept: int) -> tuple[int, int] | None:
        """(records on the host, weights there before the disk) of the layers that the device does not hold."""
        rest = len(self.plans) - state
        least = max(0, kept - state)  # weights kept on the device are renewed from the host
        training = self.setting.format.training
        for host in range(rest, -1, -1):
            near = rest - host if training else max(0, least - host)
            if self.fits(state, host, near, kept):
                return host, near
        if not training:
            return None
        for host in range(rest + 1):
            near = max(0, least - host)
            if self.fits(state, host, near, kept):
                return host, _most(near, rest - host, lambda k, host=host: self.fits(state, host, k, kept))
        return None

    def fits_device(self, *counts: int) -> bool:
        return self.account(*counts).device <= self.budgets.device

    def fits(self, *counts: int) -> bool:
        found = self.account(*counts)
        budgets = self.budgets
        return found.device <= budgets.device and found.host <= budgets.host and found.disk <= budgets.disk

    def account(self, *counts: int) -> Account:
        if counts not in self._known:
            setting = self.setting
            self._known[counts] = account(
                self.plans,
                self.placement(*counts),
                setting.format,
                setting.micro_batch_tokens,
                setting.width,
                setting.beside,
                setting.cache,
            )
        return self._known[counts]

    def placement(self, state: int, host: int, near: int, kept: int, plain: int = 0) -> Placement:
        n, setting = len(self.plans), self.setting
        edge = state + host + near
        return Placement(
            weights=tuple("device" if i < kept else "host" if i < edge else "disk" for i in range(n)),
            state=("device",) * state + ("host",) * host + ("disk",) * (n - state - host),
            recompute=tuple(i >= plain for i in range(n)),
            activations=self.activations,
            micro_batches=setting.micro_batches,
            visits=setting.visits,
            boundary=boundary_bytes(setting.format, setting.micro_batch_tokens, setting.width),
            ranks=setting.ranks,
        )


def _most(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The largest of low..high that holds, where what holds for one holds for all below it, but perhaps for `high`:
    with everything on the device no slots are needed."""
    if holds(high):
        return high
    if low == high or not holds(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _refusal(plans: Sequence[LayerPlan], budgets: Budgets, setting: Setting, kinds: Sequence[str]) -> DoesNotFit:
    """Names the first limit that forbids everything, from the device outwards."""
    searches = [_Search(plans, budgets, setting, kind) for kind in kinds]
    able = [(search, state) for search in searches if (state := search.most_state(len(plans))) is not None]
    if not able:
        n = len(plans)
        tries = [s.account(k, n - k, 0, s.least_kept(k)) for s in searches for k in (0, n)]
        least = min(tries, key=lambda found: found.device)
        return DoesNotFit("device", least.device, budgets.device, least.device_parts)
    tries = []
    for search, state in able:
        rest, kept = len(plans) - state, search.least_kept(state)
        for host in range(rest + 1):
            for near in {max(0, kept - state - host), rest - host}:
                tries.append(search.account(state, host, near, kept))
    within = [found for found in tries if found.disk <= budgets.disk]
    enough = [found for found in tries if found.host <= budgets.host]
    disk = min((found.disk for found in enough), default=None)
    least = min(within, key=lambda found: found.host)  # nothing on the disk is always within
    return DoesNotFit("host", least.host, budgets.host, least.host_parts, disk)

"""What most targets answer alike: no number of theirs can be wrong, and every site that they take changes."""

from __future__ import annotations

from collections.abc import Sequence

from passes.site import AttentionSite
from passes.targets.misfit import Misfit


class Whole:
    """A base for targets that change every site which they do not refuse."""

    def misfit(self, site: AttentionSite) -> Misfit | None:
        """There is no number that could be wrong."""
        return None

    def idle(self, site: AttentionSite) -> str | None:
        """An attention always has something to replace."""
        return None

    def keeps(self, sites: Sequence[AttentionSite]) -> dict[str, str]:
        """No site is left as it is by definition."""
        return {}

"""The short run with a fixed seed that continuous integration makes of each layer."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.fuzz.campaign import Campaign

SEED = 6


class SliceCase(SynchronousTestCase):
    """The server, as it is."""

    def fuzz(self, layer: str, packets: int) -> Campaign:
        """Nothing is found."""
        campaign = Campaign(SEED, [layer])
        while campaign.packets < packets:
            self.assertIsNone(campaign.run_one(), f"seed {SEED}")
        return campaign

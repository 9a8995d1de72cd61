"""A rank's dealings with what lies outside its training: its node, the other ranks, Ray, the
driver. The only room on a worker that knows Ray.
"""

from tp_trainer.session.rank import Progress, Rank
from tp_trainer.session.reporter import Reporter
from tp_trainer.session.signs import Watch

__all__ = ["Progress", "Rank", "Reporter", "Watch"]

"""What a daemon that has just started does about what it finds: a pure function, facts -> action.

    SourceFound, DestinationFound, AtRest, Stray --decide--> Action(deed, why, step, expects, ...)

Rules
1. Recovery chooses where to begin and nothing else. A migration goes on with the step of its
   journalled phase, which looks at both sides before it acts: a wrong guess here does no harm.
2. A process is ended on proof alone: this host's durable refusal, the source's word that a
   migration that was never granted has ended, or the journalled release of a VM whose process
   itself says that its guest has left. Unknown is no proof.
3. `may_run` is said only of the side that owns the guest by its journal (and by the arbiter's
   record, where there is one).
4. `expects` is foretold only where nothing but a new fault can make it come otherwise. None: the
   step finds out.
"""

from migrd.core.recovery_action import Action
from migrd.core.recovery_at_rest import of_stray, of_vm
from migrd.core.recovery_destination import of_destination
from migrd.core.recovery_facts import AtRest, DestinationFound, SourceFound, Stray
from migrd.core.recovery_source import of_source


def decide(facts: SourceFound | DestinationFound | AtRest | Stray) -> Action:
    """The one action for these facts; total over their whole domain."""
    match facts:
        case SourceFound():
            return of_source(facts)
        case DestinationFound():
            return of_destination(facts)
        case AtRest():
            return of_vm(facts)
        case Stray():
            return of_stray(facts)

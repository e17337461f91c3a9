"""Published failures of other projects, nearly all of live migration, replanted here and caught.

One row each: what failed there, what we make fail here, how near that is, which check says so.
The sentences are ours, from the reports read in public; a number is an issue or a pull request.

Longer than others because it is one table.
"""

from __future__ import annotations

from typing import Final

from tests.published import arriving, going_on, handover, telling, writing_down
from tests.published.row import Area, Row

ROWS: Final = (
    # Who runs the guest -------------------------------------------------------------------------
    Row(
        "oxidecomputer/propolis#252",
        Area.OWNERSHIP,
        "A source resumed its guest by itself after any failure, also when the target had already "
        "taken over what the guest needs.",
        "The grant is journalled when the source is in its device phase instead of seen "
        "`completed`; the acknowledgement is swallowed and the link cut as the destination runs.",
        "The same: the VMM resumes by itself, and what forbids it is when the grant may be given. "
        "There the disks' connections were lost, here the guest runs twice.",
        handover.no_source_resumes_beside_a_destination_that_runs,
        handover.a_source_in_its_device_phase_is_done,
        "I1: runs on",
    ),
    Row(
        "kubevirt/kubevirt#15711",
        Area.OWNERSHIP,
        "After a migration that was said to have succeeded the process at the source was still "
        "there, so that two instances of one VM existed.",
        "The source is reported as released without its QEMU having been ended.",
        "The process that is left is the same; there its guest ran as well (the cause was never "
        "published), here QEMU would run it at the next `cont`.",
        handover.one_process_is_left_after_a_success,
        handover.the_source_is_released_in_words_only,
        "left: ",
    ),
    Row(
        "kubevirt/kubevirt#13112",
        Area.OWNERSHIP,
        "The source crashed after the guest had moved and before that was reported; the VM was "
        "declared failed and the running target deleted.",
        "The source's QEMU dies in the instant in which the guest runs at the destination; its "
        "death is taken for the outcome.",
        "The same crash at the same moment and the same wrong answer; what would follow (the "
        "target's end) is left to the reader.",
        handover.a_source_that_crashes_after_the_guest_has_left_changes_nothing,
        handover.a_dead_source_is_a_lost_guest,
        "said to be guest_lost",
    ),
    Row(
        "kubevirt/kubevirt#15299",
        Area.OWNERSHIP,
        "In one of five migrations between clusters the source's record never became `succeeded`, "
        "because its update was lost to a concurrent one.",
        "The answer to GRANT is lost once, and GRANT is not asked again.",
        "The same end (the guest runs there, the source never knows) by another loss: a message "
        "instead of an update of a shared object.",
        handover.a_success_that_is_not_heard_is_asked_for_again,
        handover.a_grant_is_asked_for_once,
        "not within 300 s: .* over",
    ),
    Row(
        "OpenNebula/one#6634",
        Area.OWNERSHIP,
        "A step after the move (setting the guest's clock) failed, and the whole migration was "
        "taken for failed although the guest ran at the target.",
        "The source's QEMU cannot be ended after the guest has moved; that failure is let roll the "
        "migration back.",
        "The same rule broken, with another late step. Here the mutant even resumes the source.",
        handover.what_fails_after_the_guest_runs_there_does_not_bring_it_back,
        handover.a_late_failure_is_a_failure,
        "I1: runs on",
    ),
    Row(
        "launchpad.net/nova#1414065",
        Area.OWNERSHIP,
        "An error raised after the guest had moved left the VM recorded as shut off, and its owner "
        "could start it a second time.",
        "Ending the source's QEMU reports an error; the VM's entry forgets that the guest has "
        "left, and the owner asks to start it.",
        "The same chain to its end: a second copy beside the running one.",
        handover.a_vm_that_has_left_is_not_started_again,
        handover.a_vm_that_has_left_is_only_off,
        "I1: runs on",
    ),
    Row(
        "apache/cloudstack#12331",
        Area.ANSWERS,
        "A migrated VM stayed paused at its destination, and nobody looked whether it ran.",
        "The destination's QEMU refuses `cont` for three seconds (an image lock); it is said once "
        "and taken for done.",
        "The same answer about the same state; why the domain was paused there is not in the "
        "report, the refused `cont` is ours.",
        handover.a_success_is_said_of_a_guest_that_runs,
        handover.cont_is_said_and_not_looked_after,
        "it stands still",
    ),
    Row(
        "OpenNebula/one#7662",
        Area.JOURNAL,
        "A migration that failed at the destination left the VM recorded on that host, and what "
        "was done by that record destroyed the only copy.",
        "The VM is written down as gone together with the grant; the destination refuses, and the "
        "source's daemon is restarted.",
        "The same record ahead of the fact. There it moved with a VM that was off, and disks were "
        "lost; here it is a running guest that its own host disowns.",
        handover.a_guest_that_stayed_is_this_hosts_after_a_restart,
        handover.the_vm_is_written_down_as_gone_with_the_grant,
        "said: departed",
    ),
    Row(
        "etcd-io/etcd#10811",
        Area.OWNERSHIP,
        "A lock that lives as long as a lease was held by two clients, when one of them was cut "
        "off and did not know that its lease had ended.",
        "A host is cut off from the arbiter and its lease ends; its VM's record may then be taken "
        "by any other.",
        "The same lease, for a guest instead of a lock. Not a migration there: what a fleet would "
        "have built its ownership on.",
        writing_down.a_lease_that_ended_frees_nobodys_guest,
        writing_down.who_has_no_lease_has_no_guest,
        "given to beta while it may run on alpha",
    ),
    Row(
        "canonical/lxd#6226",
        Area.JOURNAL,
        "After the disk had been full the daemon's database did not start again, for the end of "
        "its last log file was not what a whole write leaves.",
        "The last record is half on the disk when the daemon dies; a log with a broken end is "
        "refused like a damaged one.",
        "The same refusal at the start; there zeros were left over, here a record is half written. "
        "Not a migration there, but the daemon that would carry one.",
        writing_down.a_journal_whose_last_write_was_broken_off_opens_again,
        writing_down.a_broken_end_is_a_broken_journal,
        "the daemon does not start",
    ),
    # A guest that stays -------------------------------------------------------------------------
    Row(
        "cloud-hypervisor/cloud-hypervisor#2895",
        Area.ROLLBACK,
        "When a migration failed after the source had been paused, the source stayed paused.",
        "The destination refuses after the source's QEMU has completed; nobody says `cont` there.",
        "The same. QEMU resumes by itself only before `completed`, so it is that moment.",
        handover.a_guest_that_was_stopped_for_nothing_runs_again,
        handover.the_source_is_left_as_it_stands,
        "rolled back, and it stands still",
    ),
    Row(
        "cloud-hypervisor/cloud-hypervisor#7815",
        Area.ROLLBACK,
        "A guest that was paused before its migration was running after the migration had failed.",
        "A paused guest is migrated and the link cut; rolling back resumes whatever does not run.",
        "The same.",
        handover.a_paused_guest_stays_paused_when_its_migration_fails,
        handover.whoever_is_rolled_back_runs,
        "it was paused, and runs",
    ),
    Row(
        "qemu/qemu@b4e9ddccd1a6",
        Area.ROLLBACK,
        "A guest in standby was woken by being migrated.",
        "A guest goes to standby while it is copied and the migration is cancelled; `suspended` is "
        "treated like `paused`, for which `cont` is right.",
        "The same state misread; QEMU woke it on the way out, our mutant on the way back.",
        handover.a_guest_that_sleeps_is_not_woken_by_a_migration_that_is_undone,
        handover.sleeping_is_being_paused,
        "was woken",
    ),
    Row(
        "apache/cloudstack#11286",
        Area.ROLLBACK,
        "A VM whose migration could not even be prepared, as the target was not available, was "
        "stopped.",
        "The destination's daemon is killed while it gets ready; the source then ends the VM.",
        "The same trigger and the same end; there it was a fall-back of host maintenance.",
        going_on.a_destination_that_cannot_get_ready_costs_the_guest_nothing,
        going_on.who_cannot_be_moved_is_stopped,
        "stopped, because it could not be moved",
    ),
    Row(
        "harvester/tests#2006",
        Area.ROLLBACK,
        "Five seconds without network in the middle of a migration ended with the VM rebooted.",
        "Both networks are cut for five seconds in precopy; a destination that is not heard makes "
        "the source end its QEMU, so that the VM be started anew.",
        "The fault is the same. Which part rebooted the VM is not in the report; the reaction is "
        "our reading of it.",
        going_on.a_network_cut_of_five_seconds_is_waited_out,
        going_on.who_is_not_heard_is_started_anew,
        "I2: the last whole copy was destroyed",
    ),
    # A daemon that begins anew ------------------------------------------------------------------
    Row(
        "kubevirt/kubevirt#18763",
        Area.RESTART,
        "A node's daemon that restarted soon after a migration did not find the guest in its empty "
        "cache, declared it failed and removed it.",
        "The destination's daemon is restarted while its QEMUs cannot be reached; what is not "
        "found is taken for dead, and the VM is started.",
        "The same absence read as death, at the same moment; there the guest was removed, here a "
        "second one would be started.",
        going_on.what_a_new_daemon_does_not_find_at_once_is_not_dead,
        going_on.what_is_not_found_is_dead,
        "I1: runs on",
    ),
    Row(
        "apache/cloudstack#13054",
        Area.RESTART,
        "A migration failed because the source's agent could not look the VM up, and that was not "
        "told apart from a VM that is not there.",
        "The source's monitor cannot be reached for three seconds in precopy; that is taken for "
        "the death of the guest.",
        "The same ambiguity (not found, or not reached), one layer lower: QMP instead of libvirt.",
        going_on.a_monitor_that_cannot_be_reached_is_no_dead_guest,
        going_on.who_is_not_reached_is_gone,
        "said to be guest_lost",
    ),
    # No phase without an exit -------------------------------------------------------------------
    Row(
        "xapi-project/xenopsd#722",
        Area.DEADLINE,
        "When the destination's daemon failed after memory had been copied, the source waited for "
        "its word until somebody restarted the tool stack.",
        "The destination's daemon is killed with the grant unanswered; the source waits for the "
        "answer without a deadline.",
        "The same point of the protocol. There the source could have failed at once; here nobody "
        "may guess, so the right end is a person called, and success when it is back.",
        going_on.a_destination_that_fails_after_the_copy_calls_a_person_and_goes_on,
        going_on.the_answer_is_waited_for_without_end,
        "not within 60 s: a person is called",
    ),
    Row(
        "kubevirt/kubevirt#17317",
        Area.DEADLINE,
        "While two sides found each other, a daemon that was away left the migration waiting "
        "silently for ever: no time-out was looked at.",
        "The destination's daemon is killed while it gets ready, and getting ready has no "
        "deadline.",
        "The same: a phase before any byte is sent, whose condition nobody will meet.",
        going_on.getting_ready_has_a_deadline,
        going_on.getting_ready_takes_its_time,
        "not within 60 s: .* over",
    ),
    Row(
        "kubevirt/kubevirt#2228",
        Area.CANCEL,
        "A migration that was cancelled before it copied anything stayed where it was.",
        "A migration that gets ready is cancelled; the table has no row for that.",
        "The same wish in the same phase, admitted and without effect.",
        going_on.a_cancel_before_anything_is_copied_is_heard,
        going_on.only_what_copies_can_be_cancelled,
        "not within 5 s: .* over",
    ),
    Row(
        "apache/cloudstack#3742",
        Area.DEADLINE,
        "The configured limit on the time that a migration may take was not kept.",
        "A guest that never converges; the deadline of the request is not looked at.",
        "The same promise; which of several settings was ignored there is not followed here.",
        going_on.the_deadline_that_was_asked_for_is_kept,
        going_on.the_deadline_is_not_looked_at,
        "not within 60 s: .* over",
    ),
    # Rounds, limits, throttle -------------------------------------------------------------------
    Row(
        "kubevirt/kubevirt#3504",
        Area.CONVERGENCE,
        "A guest under a memory stress test could never be migrated.",
        "A guest that dirties ten times what the link carries, and a throttle that is never "
        "raised.",
        "The same load in the simulator. There nothing slowed the guest by default; a policy that "
        "allows it is what makes it move here.",
        going_on.a_guest_under_stress_is_slowed_until_it_can_move,
        going_on.nobody_is_slowed,
        "deadline",
    ),
    Row(
        "cloud-hypervisor/cloud-hypervisor#8899",
        Area.CONVERGENCE,
        "The estimate of the downtime counted the memory that was left, and not what a switchover "
        "costs besides, so that limits were missed.",
        "The fixed cost of a switchover is zero: what is left fits the limit by 10 ms, and a "
        "switchover takes 30 ms more.",
        "The same term missing in the same comparison.",
        going_on.a_switchover_counts_what_is_not_memory,
        going_on.a_switchover_costs_nothing_but_its_bytes,
        "fits the limit",
    ),
    # Postcopy -----------------------------------------------------------------------------------
    Row(
        "kubevirt/kubevirt#15924",
        Area.POSTCOPY,
        "A network failure in postcopy failed the migration, and with it the VM, although QEMU can "
        "take a paused postcopy up again.",
        "The link is cut in postcopy; a paused postcopy is taken for a failed one.",
        "The same.",
        going_on.a_broken_postcopy_is_taken_up_again,
        going_on.a_pause_in_postcopy_is_the_end,
        "postcopy failed",
    ),
    Row(
        "cloud-hypervisor/cloud-hypervisor#8890",
        Area.POSTCOPY,
        "When postcopy failed after the guest had moved, the source was resumed from a state that "
        "was no longer the guest's.",
        "The destination's QEMU dies in postcopy; the source is told to run.",
        "The same wish. QEMU itself refuses it at that point, so what is seen of it here is a "
        "lost guest that nobody tells of, not an old copy that runs.",
        going_on.a_guest_that_was_lost_in_postcopy_is_not_run_from_its_old_copy,
        going_on.a_failed_postcopy_resumes_its_source,
        "not within 60 s: .* over",
    ),
    # What a destination leaves behind -----------------------------------------------------------
    Row(
        "OpenNebula/one#3582",
        Area.INCOMING,
        "After a failed migration the VM existed on the destination as well.",
        "The link is cut in precopy; the destination's copy is not ended.",
        "The same.",
        arriving.a_copy_that_is_of_no_use_is_ended,
        arriving.the_copy_is_left,
        "the copy on beta is ended",
    ),
    Row(
        "cloud-hypervisor/cloud-hypervisor#8485",
        Area.INCOMING,
        "A migration that was broken off was reported by the receiver without an error, like one "
        "that had arrived.",
        "The link is cut in precopy; a stream that ended is taken for a guest that has arrived.",
        "The same answer of the same side.",
        arriving.a_broken_arrival_is_no_arrival,
        arriving.a_stream_that_ended_has_brought_the_guest,
        "said to have the guest",
    ),
    Row(
        "oxidecomputer/propolis#323",
        Area.INCOMING,
        "A target whose incoming migration had failed stayed `migrating`, and could take no other.",
        "The stream breaks while the two daemons cannot speak; the destination passes over its "
        "QEMU's `failed`.",
        "The same state left behind. Here an idle deadline would end it late; the check is that it "
        "ends at once.",
        arriving.a_destination_whose_stream_failed_says_so_without_being_told,
        arriving.a_failed_stream_is_waited_for,
        "gives the migration up by itself",
    ),
    Row(
        "lxc/incus#2517",
        Area.INCOMING,
        "A target's QEMU waited for a stream that would never come; the operation could not be "
        "deleted, and leftovers remained.",
        "The source's host is gone behind a link that tells nobody; the destination never gives "
        "up.",
        "The same wait. What went wrong in QEMU there is not known; a silent link is the plainest "
        "way to it.",
        arriving.a_destination_that_nobody_sends_to_any_more_gives_up,
        arriving.a_destination_waits_for_ever,
        "the destination gives up",
    ),
    Row(
        "oxidecomputer/propolis#170",
        Area.INCOMING,
        "After a migration had been refused for unequal machines the source refused the next one: "
        "one was already in progress.",
        "A destination with another machine refuses; ended migrations are still counted as going "
        "on when the next one is asked for.",
        "The same.",
        arriving.a_migration_that_failed_does_not_stand_in_the_way_of_the_next,
        arriving.whoever_migrated_once_still_does,
        "refused for the one before: already_migrating",
    ),
    # Dirty pages --------------------------------------------------------------------------------
    Row(
        "oxidecomputer/propolis#387",
        Area.DIRTY_PAGES,
        "Reading the dirty bits cleared them, so that a second attempt after a failed one would "
        "not have moved the pages that only the first had seen.",
        "A second transfer over the same sources offers only what became dirty since the first.",
        "The same.",
        telling.a_second_attempt_moves_all_pages_again,
        telling.only_what_is_dirty_is_offered_the_second_time,
        "not offered",
    ),
    Row(
        "cloud-hypervisor/cloud-hypervisor#8567",
        Area.DIRTY_PAGES,
        "A device's DMA log does not see mappings that come later, and switching it off and on "
        "again to follow them loses what was written in between.",
        "A log that was lost is begun anew, and its pages are not taken for dirty.",
        "The second half of the report (the restart of a log); we refuse a virtual IOMMU with a "
        "device log, so new mappings cannot come.",
        telling.what_was_written_before_tracking_began_anew_is_not_lost,
        telling.tracking_is_simply_begun_anew,
        "and lost",
    ),
    Row(
        "cloud-hypervisor/cloud-hypervisor#2922",
        Area.DIRTY_PAGES,
        "After a failed migration the source went on logging dirty pages.",
        "A source of dirty pages fails in a round; tracking is switched off only after a transfer "
        "that went well.",
        "The same leak, for the sources that migrd itself harvests.",
        telling.tracking_ends_everywhere_whatever_fails,
        telling.tracking_ends_where_a_transfer_ended_well,
        "still tracked",
    ),
    # Devices ------------------------------------------------------------------------------------
    Row(
        "strongtz/i915-sriov-dkms#405",
        Area.DEVICES,
        "A VM with a virtual function was offered for live migration, and QEMU refused when it was "
        "tried: the driver does not support it.",
        "A device whose driver cannot migrate it; the plan does not ask for that.",
        "The same device. The simulated QEMU does not refuse it late, so the mutant lets it go "
        "through to the end.",
        telling.a_device_that_cannot_move_is_refused_before_anything_is_touched,
        telling.whether_a_device_moves_shows_when_it_is_tried,
        "let through",
    ),
    Row(
        "NVIDIA/QEMU#18",
        Area.DEVICES,
        "QEMU asked for dirty tracking on a page table for which the kernel refuses it, and the VM "
        "did not boot.",
        "QEMU ends with the kernel's EOPNOTSUPP for the page table; there is no second try.",
        "The same errno at the same call; that nesting is why is not simulated.",
        telling.a_page_table_that_is_refused_tracking_does_not_keep_the_vm_from_starting,
        telling.one_try_and_no_other,
        "the VM does not start",
    ),
    Row(
        "kubevirt/kubevirt#13721",
        Area.DEVICES,
        "An interface that was unplugged was removed from what was known of the VM while the guest "
        "still had it, and the next migration failed.",
        "The guest does not let go of a device; it is struck from the VM's definition all the "
        "same.",
        "The same difference between QEMU and the record, for a passed-through device.",
        telling.a_device_that_the_guest_has_not_let_go_of_is_still_there,
        telling.asked_to_let_go_is_let_go,
        "is said",
    ),
    # How many at once ---------------------------------------------------------------------------
    Row(
        "kubevirt/kubevirt#15146",
        Area.ADMISSION,
        "Many migrations asked for at the same moment went beyond the limit for a node, because "
        "they were counted from data that lagged behind.",
        "Three migrations are asked for at once; only those that already copy are counted.",
        "The same lag between being let in and being counted.",
        going_on.no_more_leave_at_once_than_are_allowed,
        going_on.only_what_copies_takes_a_slot,
        "at once",
    ),
    Row(
        "kubevirt/kubevirt#9338",
        Area.ADMISSION,
        "Lowering the limit below what was going on made the number of free slots negative, and "
        "the controller crashed on a slice.",
        "A daemon is restarted with a lower limit; a negative number of free slots is used to cut "
        "the queue.",
        "The same arithmetic; in Python the slice does not crash but begins what has to wait.",
        going_on.a_limit_lowered_below_what_goes_on_starts_nothing,
        going_on.free_slots_may_be_negative,
        "begun beyond the limit",
    ),
    # Who may speak ------------------------------------------------------------------------------
    Row(
        "golang/vulndb#4107",
        Area.PEERS,
        "A compromised node daemon of KubeVirt (GHSA-ggp9-c99x-54gp) could act on another node's "
        "VMs with its own certificate, because any of the fleet's was accepted.",
        "A third host with a good certificate sends GRANT for a migration that is not its own, and "
        "nobody asks whose it is.",
        "The same trust in any member; there it posed as the API server, here as the source.",
        telling.another_host_of_the_fleet_has_no_say_in_a_migration,
        telling.whoever_is_of_the_fleet_may_say_all,
        "on the word of a stranger",
    ),
    # True answers -------------------------------------------------------------------------------
    Row(
        "oVirt/vdsm#35",
        Area.ANSWERS,
        "After a failed migration the VM was shown as up without looking, though it may have been "
        "paused or have ended.",
        "The guest shuts itself down while it is copied and the migration is cancelled; its state "
        "is not looked at afterwards.",
        "The same.",
        telling.what_a_guest_does_after_a_failed_migration_is_looked_at,
        telling.who_stayed_runs,
        "said to be running",
    ),
    Row(
        "oxidecomputer/propolis#326",
        Area.ANSWERS,
        "A source that resumed its guest after a failure did not publish that it ran again.",
        "The link is cut in precopy; the end is kept and not published.",
        "The same.",
        telling.that_a_guest_stayed_is_told_to_whoever_listens,
        telling.an_end_is_told_to_nobody,
        "told: ",
    ),
    Row(
        "kubevirt/kubevirt#12260",
        Area.ANSWERS,
        "What is known of a migration was empty until it had ended.",
        "Progress is shown of ended migrations only.",
        "The same.",
        telling.how_far_it_is_shows_while_it_goes_on,
        telling.progress_shows_at_the_end,
        "nothing is said while it goes on",
    ),
    Row(
        "kubevirt/kubevirt#17504",
        Area.METRICS,
        "The metric of the dirty rate measured guests that were being migrated, which fails and "
        "gets in the way of the migration's own tracking.",
        "The sampler goes on while a migration does.",
        "The same contention; that theirs ran inside the scrape is another rule of ours "
        "(tests/metrics).",
        telling.nobody_measures_a_guest_that_migrates,
        telling.a_migration_is_no_reason_not_to_measure,
        "while it migrated",
    ),
    Row(
        "kubevirt/kubevirt#8368",
        Area.METRICS,
        "The gauges of migrations by phase, counted up and down by events, showed negative values.",
        "A new daemon is told of a phase left that it never saw entered; the gauge is counted up "
        "and down.",
        "The same way of counting and the same value.",
        telling.what_goes_on_is_counted_right_by_a_new_daemon,
        telling.phases_are_counted_up_and_down,
        "fewer than none",
    ),
)

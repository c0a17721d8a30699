"""The tests can fail: a bug is planted in a copy of the package, and the test named here finds it.

A patch whose text is not there any more, or is there twice, fails: then the code has changed, and
the bug has to be planted anew.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.planted
REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("ckpt_callbacks", "ckpt_callbacks_mlflow", "ckpt_callbacks_wandb")


@dataclass(frozen=True)
class Bug:
    """`old`, which is in `file` once, becomes `new`; then the test `found_by` fails."""

    what: str
    layer: str
    found_by: str
    file: str
    old: str
    new: str


PROPERTY = "property: pure code, Hypothesis draws what goes in"
MACHINE = "state machine: ledger, saver and workers under every order of events"
KILL = "failpoint kill: a real process ends at a named point and is run again"
FILES = "unit: one module on real files"
ORBAX = "real run: Orbax saves and restores, the tracker is in memory"
CONTRACT = "contract of trackers: a real MLflow"

WANDB = "W&B's client, against a stand-in for its server"

ADOPTION = "ckpt_callbacks/adoption.py"
ARTIFACTS = "ckpt_callbacks/artifacts.py"
REGISTRY = "ckpt_callbacks_mlflow/_registry.py"
DIRECTORY = "ckpt_callbacks/directory.py"
LEDGER = "ckpt_callbacks/ledger.py"
COPIES = "ckpt_callbacks/copies.py"
SITUATION = "ckpt_callbacks/situation.py"
MANIFEST = "ckpt_callbacks/manifest.py"
PLAN = "ckpt_callbacks/plan.py"
RECOVERY = "ckpt_callbacks/recovery.py"
RETENTION = "ckpt_callbacks/retention.py"
SAVER = "ckpt_callbacks/saver.py"
VERSIONS = "ckpt_callbacks_wandb/_versions.py"
WORKER = "ckpt_callbacks/worker.py"

LOCK = "fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)"
OLDER_THAN_A_MINUTE = 'time.time() - self._read_owner().get("since", 0.0) > 60'
OWNER_LIVES = "Path(f\"/proc/{self._read_owner().get('pid')}\").exists()"

ANY_ORDER = "test_machine.py::test_under_every_order_of_events"
KILLED_AT = "test_kills.py::test_killed_at_a_failpoint_it_ends_as_if_it_never_was"
POLICY_CHANGED = (
    "test_resume.py::test_a_changed_policy_is_shown_and_waits_until_its_first_decision_is_whole"
)

BUGS = [
    # What is kept
    Bug(
        "the newest is not kept",
        PROPERTY,
        "test_retention.py::test_the_newest_is_kept_under_every_policy",
        RETENTION,
        'kept.setdefault(ordered[-1].step, "newest")',
        "pass",
    ),
    Bug(
        "NaN and infinities rank",
        PROPERTY,
        "test_retention.py::test_best_is_the_best_finite_value",
        RETENTION,
        "return float(value) if math.isfinite(value) else None",
        "return float(value)",
    ),
    Bug(
        "of equal values the earlier step is better",
        PROPERTY,
        "test_retention.py::test_best_is_the_best_finite_value",
        RETENTION,
        "values = [(sign * v, step) for v, step in measured if v is not None]",
        "measured = [(v, -step) for v, step in measured]\n"
        "        values = [(sign * v, step) for v, step in measured if v is not None]\n"
        "        return [-step for _, step in sorted(values, reverse=True)][:n]",
    ),
    Bug(
        "a missing metric counts as zero",
        PROPERTY,
        "test_retention.py::test_best_is_the_best_finite_value",
        RETENTION,
        "candidate.metrics.get(self.metric)",
        "candidate.metrics.get(self.metric, 0.0)",
    ),
    Bug(
        "pins are ignored",
        PROPERTY,
        "test_retention.py::test_what_is_pinned_stays",
        RETENTION,
        "for step in (c.step for c in ordered if c.step in pins):",
        "for step in ():",
    ),
    Bug(
        "pins are ignored by a store that keeps less",
        PROPERTY,
        "test_retention.py::test_what_is_pinned_stays",
        RETENTION,
        "{*own.keep(there), *pins}",
        "{*own.keep(there)}",
    ),
    Bug(
        "what an old policy keeps goes",
        PROPERTY,
        "test_retention.py::test_what_an_old_policy_keeps_stays_too",
        RETENTION,
        "for step in decide(old, ordered).kept if old else ():",
        "for step in ():",
    ),
    Bug(
        "a changed policy evicts all at once",
        ORBAX,
        POLICY_CHANGED,
        SITUATION,
        "old = policy_from_json(change.policy) if change else None",
        "old = None",
    ),
    Bug(
        "a changed policy waits for no store",
        ORBAX,
        POLICY_CHANGED,
        SITUATION,
        "return all(isinstance(action, Delete) for actions in plans for action in actions)",
        "return True",
    ),
    # A local copy goes only when every store that should hold it has it, or wants it no more
    Bug(
        "a copy counts before the store has it",
        MACHINE,
        ANY_ORDER,
        COPIES,
        'Copy("pending", "")',
        'Copy("confirmed", "")',
    ),
    Bug(
        "a local copy goes while a store reads it",
        ORBAX,
        "test_run.py::test_uploads_slower_than_saves_still_move_last_and_pile_up_nothing",
        SITUATION,
        "evictable(self.decision, [r.step for r in self.complete], leased)",
        "evictable(self.decision, [r.step for r in self.complete], ())",
    ),
    Bug(
        "a local copy goes although it became the best in the meantime",
        ORBAX,
        "test_run.py::test_a_step_that_becomes_the_best_just_before_its_eviction_stays",
        LEDGER,
        "if step not in self.evictable():",
        "if False:",
    ),
    Bug(
        "eviction removes files where they are",
        FILES,
        "test_directory.py::test_eviction_takes_a_step_out_at_once_and_frees_it_later",
        DIRECTORY,
        'path.rename(self.trash / f"{step}-{time.time_ns()}")',
        "shutil.rmtree(path)",
    ),
    Bug(
        "a checkpoint leaves a small disk before that is written down",
        KILL,
        "test_kills.py::"
        "test_killed_again_and_again_while_checkpoints_leave_a_small_disk_nothing_is_lost",
        SAVER,
        """            if ledger.let_go(step):
                hit("record-left")
                directory.to_trash(step)
                hit("left-for-trash")
""",
        """            if step in ledger.spare():
                directory.to_trash(step)
                hit("left-for-trash")
                ledger.let_go(step)
                hit("record-left")
""",
    ),
    Bug(
        "a checkpoint leaves a small disk before every store has it",
        MACHINE,
        ANY_ORDER,
        SITUATION,
        "and all(_has(r, s) for s, decision in wanted.items() if r.step in decision.kept)",
        "and wanted",
    ),
    Bug(
        "what is pinned leaves a small disk",
        ORBAX,
        "test_small_disk.py::test_what_is_pinned_stays",
        SITUATION,
        "narrow(self.decision, self.policy, self.here, history, self.run.pinned)",
        "narrow(self.decision, self.policy, self.here, history)",
    ),
    Bug(
        "what left a small disk is forgotten once no store has it",
        ORBAX,
        "test_small_disk.py::test_what_left_and_is_removed_later_is_remembered_as_evicted",
        COPIES,
        'if record.state == "complete":  # else this was noted when its files here went',
        "if False:",
    ),
    # Aliases name complete copies, always
    Bug(
        "an alias moves to a copy that the store does not have yet",
        PROPERTY,
        "test_plan.py::test_at_every_instant_each_alias_names_a_copy",
        PLAN,
        "for name, step in decision.aliases.items() if step in there}",
        "for name, step in decision.aliases.items()}",
    ),
    Bug(
        "an alias moves to a copy that was cut",
        MACHINE,
        ANY_ORDER,
        SITUATION,
        'held = frozenset(s for s, c in copies.items() if c.state != "pending")',
        "held = frozenset(copies)",
    ),
    Bug(
        "an alias moves after its copy was deleted",
        PROPERTY,
        "test_plan.py::test_at_every_instant_each_alias_names_a_copy",
        PLAN,
        "    for name, step in wanted.items():\n        if aliases.get(name) != step:",
        "    for step in sorted({*copies} - {*decision.kept} - {*wanted.values()}):\n"
        "        yield Delete(step)\n"
        "    for name, step in wanted.items():\n        if aliases.get(name) != step:",
    ),
    Bug(
        "a copy is deleted although an alias names it",
        PROPERTY,
        "test_plan.py::test_at_every_instant_each_alias_names_a_copy",
        PLAN,
        "if s not in decision.kept and s not in named",
        "if s not in decision.kept",
    ),
    # Records
    Bug(
        "a record is written without fsync",
        FILES,
        "test_directory.py::test_a_file_is_replaced_once_its_new_content_is_on_the_disk",
        DIRECTORY,
        "os.fsync(file.fileno())",
        "pass",
    ),
    Bug(
        "a record is renamed without fsync of its folder",
        FILES,
        "test_directory.py::test_a_file_is_replaced_once_its_new_content_is_on_the_disk",
        DIRECTORY,
        'hit("file-replaced")\n    fsync(path.parent)',
        'hit("file-replaced")',
    ),
    Bug(
        "a record is written in place",
        FILES,
        "test_directory.py::test_a_file_is_replaced_once_its_new_content_is_on_the_disk",
        DIRECTORY,
        'temporary = path.with_name(f".{path.name}.tmp")',
        "temporary = path",
    ),
    Bug(
        "a checkpoint is complete before its files are on the disk",
        FILES,
        "test_manifest.py::test_a_sealed_tree_is_on_the_disk",
        MANIFEST,
        "        fsync(path)\n    fsync(root.parent)",
        "        pass\n    fsync(root.parent)",
    ),
    Bug(
        "a checkpoint is sealed before Orbax has committed it",
        MACHINE,
        ANY_ORDER,
        SAVER,
        '            with self._timed("waiting for the commit"):\n'
        "                save.pending.result()\n"
        '            hit("orbax-committed")\n            with self._timed("digests and fsync"):\n'
        "                files = ledger.directory.commit(save.step)\n",
        "            files = ledger.directory.commit(save.step)\n"
        '            save.pending.result()\n            hit("orbax-committed")\n',
    ),
    # After a kill, or a reply that was lost
    Bug(
        "recovery can not be repeated",
        KILL,
        f"{KILLED_AT}[moved-to-trash]",
        DIRECTORY,
        "if path.is_symlink() or not path.exists():",
        "if path.is_symlink():",
    ),
    Bug(
        "recovery leaves what a cut save left",
        ORBAX,
        "test_run.py::test_what_a_kill_left_is_finished_by_the_next_run",
        RECOVERY,
        "directory.remove_uncommitted(step)",
        "pass",
    ),
    Bug(
        "a run goes on after metrics that were never logged",
        ORBAX,
        "test_run.py::test_what_a_kill_left_is_finished_by_the_next_run",
        RECOVERY,
        'record.state == "saving" and record.logged and committed',
        'record.state == "saving" and committed',
    ),
    Bug(
        "a step that was discarded still counts",
        ORBAX,
        "test_resume.py::test_going_back_discards_the_newer_ones_everywhere",
        SITUATION,
        "return [r for r in self.complete if not r.discarded]",
        "return self.complete",
    ),
    Bug(
        "a copy whose reply was lost makes a second one",
        CONTRACT,
        "test_mlflow_registry.py::test_a_model_that_was_made_twice_is_one_again",
        "ckpt_callbacks_mlflow/_models.py",
        "model = found or self._create(checkpoint)",
        "model = self._create(checkpoint)",
    ),
    Bug(
        "another run's best is taken for a worse value",
        CONTRACT,
        "test_mlflow_registry.py::"
        "test_best_goes_to_another_run_only_for_a_better_value_of_the_same_metric",
        REGISTRY,
        "return rank.beats(other)",
        "return True",
    ),
    Bug(
        "an older run takes `last` back",
        CONTRACT,
        "test_mlflow_registry.py::test_last_goes_to_the_run_that_began_last_and_stays_there",
        REGISTRY,
        "ours.tags[BEGAN_TAG])) < int(",
        "ours.tags[BEGAN_TAG])) != int(",
    ),
    Bug(
        "a version with a person's alias is deleted",
        CONTRACT,
        "test_mlflow_registry.py::test_what_a_person_keeps_is_not_deleted[alias]",
        REGISTRY,
        "if any(not _is_ours(n, version.tags) for n in names) or keeps",
        "if keeps",
    ),
    Bug(
        "files that are not whole there are taken for ready",
        CONTRACT,
        "test_mlflow.py::test_a_file_that_did_not_arrive_whole_is_an_error",
        "ckpt_callbacks_mlflow/_files.py",
        "raise OSError(f",
        "print(f",
    ),
    Bug(
        "the record beside a checkpoint is believed unseen",
        CONTRACT,
        "test_mlflow_loading.py::test_a_manifest_that_is_not_the_one_sent_is_an_error",
        "ckpt_callbacks_mlflow/_fetch.py",
        'if tree_digest(record.files) != model.params.get("digest")',
        "if not record.files",
    ),
    Bug(
        "what another disk had is forgotten when its run goes on here",
        CONTRACT,
        "test_mlflow_loading.py::test_a_run_goes_on_from_mlflow_on_an_empty_disk",
        COPIES,
        'Record(step, "complete", run_id, known.time, known.metrics, lost=True)',
        'Record(step, "gone", run_id, 0.0)',
    ),
    Bug(
        "a copy is taken for held while it is being deleted",
        ORBAX,
        "test_machine.py::"
        "test_a_step_that_is_wanted_again_after_its_deletion_lost_its_reply_is_sent_again",
        WORKER,
        "copies.deleting(step)",
        "pass",
    ),
    Bug(
        "a copy whose reply was lost is forgotten",
        ORBAX,
        "test_run.py::test_a_copy_that_was_cut_goes_when_it_is_no_longer_wanted",
        WORKER,
        "copies.publishing(step)",
        "pass",
    ),
    Bug(
        "metrics count as sent before they are",
        KILL,
        f"{KILLED_AT}[metrics-sent]",
        WORKER,
        "            self._call.log_metrics(points)\n"
        '            hit("metrics-sent")\n'
        "            self._log.sent(self.store.name, offset)\n",
        "            self._log.sent(self.store.name, offset)\n"
        '            hit("metrics-sent")\n'
        "            self._call.log_metrics(points)\n",
    ),
    Bug(
        "a file of the user's counts as sent before it is",
        ORBAX,
        "test_artifacts.py::test_a_lost_reply_means_that_it_is_sent_again",
        WORKER,
        "        self._call.log_artifact(artifact.path, artifact.name)\n"
        '        hit("artifact-sent")\n'
        "        self._files.sent(self.store.name, artifact)\n",
        "        self._files.sent(self.store.name, artifact)\n"
        '        hit("artifact-sent")\n'
        "        self._call.log_artifact(artifact.path, artifact.name)\n",
    ),
    Bug(
        "a file of the user's counts before its copy is whole",
        FILES,
        "test_artifacts.py::test_at_the_failpoints_a_copy_is_whole_or_does_not_count",
        ARTIFACTS,
        'new = self._folder / f".{number}.new"',
        "new = self._folder / number",
    ),
    Bug(
        "a file of the user's is linked",
        ORBAX,
        "test_artifacts.py::test_what_an_outage_held_up_is_sent_by_the_next_run_in_order",
        ARTIFACTS,
        "shutil.copyfile(path, new / copy)",
        "(new / copy).hardlink_to(path)",
    ),
    Bug(
        "a request is removed before it is applied",
        FILES,
        "test_requests.py::test_a_request_is_there_until_it_is_applied",
        "ckpt_callbacks/inbox.py",
        "                if request:\n                    self._apply(request)\n",
        "                path.unlink()\n"
        "                if request:\n                    self._apply(request)\n"
        "                    return\n",
    ),
    # Owners, and what is foreign
    Bug(
        "a directory has no lock",
        FILES,
        "test_directory.py::test_a_second_process_is_told_who_owns_it",
        DIRECTORY,
        LOCK,
        "pass",
    ),
    Bug(
        "a directory is locked by a file with a process id",
        FILES,
        "test_directory.py::test_only_a_lock_counts_and_not_what_is_written_of_the_owner",
        DIRECTORY,
        LOCK,
        f'if {OWNER_LIVES}: raise OSError("its owner lives")',
    ),
    Bug(
        "a lock ends with time",
        FILES,
        "test_directory.py::test_only_a_lock_counts_and_not_what_is_written_of_the_owner",
        DIRECTORY,
        LOCK,
        f"if not {OLDER_THAN_A_MINUTE}: {LOCK}",
    ),
    Bug(
        "an owner that has just begun is not waited for",
        FILES,
        "test_directory.py::"
        "test_an_owner_that_has_just_begun_is_waited_for_until_it_says_how_long_it_stays[nothing]",
        DIRECTORY,
        "return self.is_mine\n",
        "return True\n",
    ),
    Bug(
        "an interrupted end of a run leaves its signal handler",
        ORBAX,
        "test_preemption.py::"
        "test_a_second_ctrl_c_while_a_tracker_is_waited_for_leaves_nothing_behind",
        "ckpt_callbacks/run.py",
        """        finally:
            self._preemption.stop()
            self._hooks.emit(RunEnded(status, unsent))
""",
        """        except ZeroDivisionError:
            pass
        self._preemption.stop()
        self._hooks.emit(RunEnded(status, unsent))
""",
    ),
    Bug(
        "a checkpoint that Orbax alone saved is taken over",
        ORBAX,
        "test_run.py::test_a_foreign_checkpoint_is_not_touched[True]",
        RECOVERY,
        "directory.saved_by(step) == ledger.run_id:",
        "directory.saved_by(step) in (None, ledger.run_id):",
    ),
    Bug(
        "a checkpoint of another run is taken over",
        ORBAX,
        "test_run.py::test_a_checkpoint_of_another_run_is_not_touched",
        RECOVERY,
        "directory.saved_by(step) == ledger.run_id:",
        "directory.saved_by(step) is not None:",
    ),
    Bug(
        "what is adopted has its record only once it is in place",
        ORBAX,
        "test_adoption.py::test_killed_and_not_repeated_a_run_goes_on_from_what_is_whole[with_v0]",
        ADOPTION,
        "    ledger.adopt(step, files, metrics, saved)\n    whole.rename(directory.path(step))",
        "    whole.rename(directory.path(step))\n    ledger.adopt(step, files, metrics, saved)",
    ),
    Bug(
        "what is adopted is made read-only, and its source with it",
        ORBAX,
        "test_adoption.py::test_a_run_goes_on_from_what_was_adopted[with_v0]",
        ADOPTION,
        "import damage, fsync, link_tree, settle",
        "import damage, fsync, link_tree\nfrom ckpt_callbacks.manifest import seal as settle",
    ),
    Bug(
        "typed keys in checkpoints of others are taken for raw ones",
        ORBAX,
        "test_foreign.py::test_without_a_state_the_names_are_those_on_disk[standard]",
        "ckpt_callbacks/contents.py",
        "for name, impl in orbax_io.key_impls(path / folder).items()",
        "for name, impl in {}.items()",
    ),
    Bug(
        "a folder that somebody made where a save goes is removed",
        ORBAX,
        "test_run.py::test_a_folder_that_somebody_made_at_the_place_of_a_save_stays",
        SAVER,
        "            return self._agreed(step, error)\n",
        "            self._discard(step)\n            return self._agreed(step, error)\n",
    ),
    Bug(
        "a symbolic link is evicted",
        FILES,
        "test_directory.py::test_a_step_that_is_a_symbolic_link_is_left_alone",
        DIRECTORY,
        "if path.is_symlink() or not path.exists():",
        "if not path.exists():",
    ),
    Bug(
        "a symbolic link is followed and made read-only",
        FILES,
        "test_manifest.py::test_symbolic_links_are_neither_listed_nor_followed",
        MANIFEST,
        "if path.is_file() and not path.is_symlink():",
        "if path.is_file():",
    ),
    # Damage
    Bug(
        "a restore checks no digest",
        ORBAX,
        "test_run.py::test_a_damaged_checkpoint_is_an_error_with_the_name_of_the_file",
        "ckpt_callbacks/sources.py",
        "check=verify",
        "check=False",
    ),
    Bug(
        "newer checkpoints are discarded for a state that does not fit",
        ORBAX,
        "test_mismatch.py::test_nothing_newer_is_discarded_for_a_state_that_does_not_fit",
        RECOVERY,
        "            compare(ledger.directory.path(step))\n",
        "",
    ),
    Bug(
        "a pattern that matches nothing is ignored",
        PROPERTY,
        "test_paths.py::test_patterns_choose_what_they_say",
        "ckpt_callbacks/paths.py",
        "if not any(map(regex.match, shown.values())):",
        "if False:",
    ),
    Bug(
        "a run keeps the state that it gave away",
        ORBAX,
        "test_restore.py::test_a_run_holds_no_state_that_the_loop_let_go[False]",
        "ckpt_callbacks/beginning.py",
        "self.given, self._must_read = None, False",
        "self._must_read = False",
    ),
    # States
    Bug(
        "what a forward pass sowed is saved",
        FILES,
        "test_adapters.py::test_sowed_values_are_no_state",
        "ckpt_callbacks/frameworks.py",
        "if not isinstance(leaf, nnx.Intermediate):",
        "if leaf is not None:",
    ),
    Bug(
        "a leaf comes back as the bytes that stand for it",
        PROPERTY,
        "test_leaves.py::test_every_leaf_comes_back_as_it_was",
        "ckpt_callbacks/leaves.py",
        """return _as(array, np.uint8), note | {"dtype": dtype}""",
        "return _as(array, np.uint8), note or None",
    ),
    Bug(
        "two leaves of one name are stored as one",
        FILES,
        "test_adapters.py::test_two_leaves_of_one_name_are_refused",
        "ckpt_callbacks/state.py",
        "if (name := dotted(path)) in joined:",
        "if (name := show(path)) in joined:",
    ),
    Bug(
        "a file of the right size counts as whole",
        FILES,
        "test_manifest.py::test_a_flipped_bit_names_the_file",
        MANIFEST,
        "found = File(found.size, digest_of(path))",
        "found = expected",
    ),
    Bug(
        "a copy from a store is not checked",
        ORBAX,
        "test_resume.py::test_a_copy_that_shares_its_bytes_or_is_damaged_repairs_nothing",
        RECOVERY,
        "            verify(into, record.files)\n",
        "",
    ),
    Bug(
        "a W&B version with an alias of somebody else is deleted",
        WANDB,
        "test_wandb_online.py::test_the_alias_of_somebody_else_keeps_a_version",
        VERSIONS,
        "if foreign := self.foreign(version):",
        "if foreign := list[str]():",
    ),
    Bug(
        "best in W&B leaves a better version of another run",
        WANDB,
        "test_wandb_online.py::"
        "test_best_leaves_another_runs_version_only_for_a_better_one[0.5-False]",
        VERSIONS,
        "    return rank.beats(other)\n",
        "    return True\n",
    ),
    Bug(
        "the newest version in W&B goes with the alias latest",
        WANDB,
        "test_wandb_online.py::test_latest_is_handed_on_before_the_newest_version_goes",
        VERSIONS,
        "        self._hand_on_latest(version, there)\n",
        "",
    ),
    Bug(
        "what wandb sync left unfinished stays",
        WANDB,
        "test_wandb_sync.py::test_what_wandbs_own_sync_left_unfinished_is_told_and_removed",
        "ckpt_callbacks_wandb/_online.py",
        "if steps := self._remove_unfinished():",
        "if steps := list[int]():",
    ),
    Bug(
        "what a person removed is not sent though it is held",
        WANDB,
        "test_wandb_sync.py::test_a_sync_sends_all_that_is_held_even_if_nothing_is_here",
        SITUATION,
        "[r for r in self.records.values() if r.lost and is_waiting(r, store)]",
        "[]",
    ),
    Bug(
        "a start of W&B sends nothing of the earlier ones",
        WANDB,
        "test_wandb_sync.py::test_a_sync_sends_every_value_once",
        "ckpt_callbacks_wandb/_rows.py",
        "self._send({name: row.values for name, row in missing.items()})",
        "pass",
    ),
]

RUNS = 1000
"""Of the state machine at most; finding one of its bugs took 4 to 170, as they were drawn."""

REPORT = '''
"""What the tests have imported, and which of them failed."""

import json
import os
import sys
from pathlib import Path

from hypothesis import Phase, settings

failed = {}


def pytest_configure():
    """Draw the same each time, and stop at the first failure: nobody wants the smallest one."""
    phases = (Phase.explicit, Phase.generate)
    quick = {"derandomize": True, "database": None, "deadline": None, "phases": phases}
    settings.register_profile("planted", **quick)
    settings.load_profile("planted")


def pytest_runtest_logreport(report):
    if report.failed:
        # What a test has left behind may fail its teardown too.
        failed.setdefault(report.nodeid, [report.when, report.longreprtext])


def pytest_sessionfinish():
    imported = {name: m.__file__ for name, m in sys.modules.items() if name in PACKAGES}
    report = json.dumps({"imported": imported, "failed": failed})
    Path(os.environ["PLANTED_REPORT"]).write_text(report)
'''


@dataclass(frozen=True)
class Outcome:
    code: int
    imported: dict[str, str]
    failed: dict[str, tuple[str, str]]
    """By test: in which phase, and how."""
    output: str


def test_with_no_bug_the_same_tests_pass(tmp_path: Path) -> None:
    outcome = run_tests(None, tmp_path)

    assert outcome.code == pytest.ExitCode.OK, outcome.output
    assert outcome.imported.keys() == set(PACKAGES)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what.replace(" ", "-"))
def test_a_planted_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    outcome = run_tests(bug, tmp_path)

    assert outcome.code == pytest.ExitCode.TESTS_FAILED, f"{bug.layer}\n{outcome.output}"
    assert outcome.failed.keys() == {f"tests/{bug.found_by}"}, outcome.output
    ((when, how),) = outcome.failed.values()
    assert when == "call", outcome.output
    assert "NameError" not in how, f"no bug, but a misspelling\n{how}"


def run_tests(bug: Bug | None, folder: Path) -> Outcome:
    """Run the test that finds `bug` against a copy that has it; all of them against one without."""
    site, report = copied(folder), folder / "report.json"
    if bug:
        plant(bug, site)
    tests = [bug.found_by] if bug else dict.fromkeys(bug.found_by for bug in BUGS)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])),
        "PLANTED_REPORT": str(report),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    environment.pop("PYTEST_ADDOPTS", None)
    # -P, since the checkout must not come before the copy.
    command = [sys.executable, "-P", "-m", "pytest", "-c", "pyproject.toml", "-x", "-q"]
    command += ["-p", "no:cacheprovider", "-p", "planted", "-p", "pytest_timeout"]
    command += ["--basetemp", str(folder / "inner")]
    command += ["--machine-runs", str(RUNS)] * bool(bug)
    command += [f"tests/{test}" for test in tests]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    assert report.exists(), output
    outcome = Outcome(done.returncode, output=output, **json.loads(report.read_text()))
    assert "ckpt_callbacks" in outcome.imported, output
    for name, file in outcome.imported.items():
        assert Path(file).is_relative_to(site), f"{name} was imported from {file}"
    return outcome


def copied(folder: Path) -> Path:
    """Copy the packages as they are installed, with a plugin that reports."""
    site = folder / "site"
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec
        assert spec.origin
        shutil.copytree(Path(spec.origin).parent, site / name)
    (site / "planted.py").write_text(REPORT.replace("PACKAGES", repr(PACKAGES)))
    return site


def plant(bug: Bug, site: Path) -> None:
    path = site / bug.file
    text = path.read_text(encoding="utf-8")
    found = text.count(bug.old)
    if found != 1:
        pytest.fail(f"{bug.what}: its patch of {bug.file} no longer applies, {found} x {bug.old!r}")
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()  # it goes by the time of the source, in seconds

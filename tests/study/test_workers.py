"""Worker processes: their answers, their errors, and their deaths."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from maquette.errors import BadInput, RunFailed
from maquette.study.workers import Answer, Told, Workers

# The workers import this file: nothing heavy in it.


def die(job, tell):
    os._exit(7)


def no_start():
    os._exit(3)


def fail(job, tell):
    tell(job)
    raise BadInput(f"{job} is bad", key="k")


def wait_for_ever(job, tell):
    if job == "bad":
        raise BadInput("bad")
    tell(job)
    signal.pause()


def news_of(workers):
    while not (news := workers.news(1.0)):
        pass
    return news


def started():
    pass


def double(job, tell):
    tell(job)
    return 2 * job


def test_jobs_tell_and_answer_in_one_process_after_another():
    with Workers(1, started, double) as workers:
        for job in (3, 4):
            workers.give(job)
            assert workers.busy == 1
            assert news_of(workers) == [(job, Told(job))]
            assert news_of(workers) == [(job, Answer(2 * job))]
            assert workers.busy == 0
    assert not multiprocessing.active_children()


def test_an_idle_worker_that_is_killed_is_not_given_a_job():
    with Workers(1, started, double) as workers:
        workers.give(1)
        news_of(workers), news_of(workers)
        [process] = multiprocessing.active_children()
        process.kill()
        process.join()
        workers.give(2)
        assert news_of(workers) == [(2, Told(2))]
        assert news_of(workers) == [(2, Answer(4))]


def test_a_worker_that_ends_says_how_and_is_replaced():
    with Workers(1, started, die) as workers:
        for job in ("a", "b"):
            workers.give(job)
            [(who, death)] = news_of(workers)
            assert (who, death.how) == (job, "exit status 7")
            assert workers.busy == 0


def test_an_error_comes_back_with_its_key_and_the_others_are_ended():
    with pytest.raises(BadInput, match="bad"), Workers(2, started, wait_for_ever) as workers:
        workers.give("good")
        assert news_of(workers) == [("good", Told("good"))]
        workers.give("bad")
        while True:
            news_of(workers)
    assert not multiprocessing.active_children()
    with pytest.raises(BadInput) as caught, Workers(1, started, fail) as workers:
        workers.give("this")
        while True:
            news_of(workers)
    assert caught.value.key == "k"


def test_workers_that_cannot_start_end_the_study():
    crew, refused = Workers(1, no_start, die), pytest.raises(RunFailed, match="before they started")
    with refused, crew as workers:
        for job in range(9):
            workers.give(job)
            news_of(workers)


def tell_until_it_fails(job, tell):
    """Writes into the file `job` if telling fails like an error of the work."""
    try:
        while True:
            tell(job)
            time.sleep(0.01)
    except Exception as error:
        Path(job).write_text(repr(error))


def test_work_whose_parent_is_gone_ends_and_does_not_fail(tmp_path):
    """A failure would be written into the store; the run of an orphan is only unfinished."""
    mark = tmp_path / "failed"
    with Workers(1, started, tell_until_it_fails) as workers:
        workers.give(str(mark))
        news_of(workers)
        [worker], [process] = workers._all, multiprocessing.active_children()
        worker.connection.close()  # as the system does when the parent is killed
        process.join(60)
        assert process.exitcode == 1
        worker.job = None
    assert not mark.exists()

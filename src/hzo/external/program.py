"""A simulator in a process of its own, in any language: arrays go in on its standard input, arrays come out."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from types import SimpleNamespace
from typing import IO, Any

from hzo._options import positive, whole
from hzo.errors import InputError, QueryError, QueryTimeoutError
from hzo.external.guard import call_within

_RETRIES = 3
_LAST_WORDS = 800  # bytes of what a process that ended had written to its standard error


def simulator(command: Sequence[str], *, timeout: float = 60.0, outputs: int = 1, copies: int = 1) -> Simulator:
    """Make a callable, from NumPy arrays to NumPy arrays, of a program that is started once and asked again and again.

    Args:
        command: the program and its arguments. For each call it reads as many arrays from its standard input as the
            callable is given, in NumPy's ``.npy`` format, and writes its results to its standard output alike. In
            Python::

                from types import SimpleNamespace as Pipe  # NumPy takes a file for one that it can seek in
                from numpy.lib.format import read_array, write_array
                source, sink = Pipe(read=sys.stdin.buffer.read), Pipe(write=sys.stdout.buffer.write)
                while True:
                    write_array(sink, simulate(read_array(source)))
                    sys.stdout.buffer.flush()

        timeout: seconds for one call, the start of the program included. What hangs is stopped.
        outputs: arrays that a call returns; several come as a tuple.
        copies: of the program that run at once, a pool of programs: the samples of a call are divided among them, and
            results come in order. A program that is killed by a signal is started anew and asked again, up to three
            times.

    Use it as ``hzo.blackbox(hzo.simulator([...]), numpy=True)``. A program that has ended or was stopped is started
    anew by the next call; so is the copy of a simulator. Needs NumPy. Source: ours.

    Raises:
        InputError: options out of range. QueryError: the program cannot be started, ended (with what it wrote to its
        standard error), or wrote something else than arrays. QueryTimeoutError: it gave no answer in time.
    """
    if isinstance(command, str) or not command:
        raise InputError(f"expected the program and its arguments as a list, ['python', 'chip.py'], got {command!r}")
    seconds, results = positive("timeout in seconds", timeout), whole("outputs", outputs)
    return Simulator(tuple(command), seconds, results, whole("copies", copies))


class Simulator:
    """Made by ``hzo.simulator``; ``close()`` ends the program, as the end of the ``with`` block of it does."""

    def __init__(self, command: tuple[str, ...], timeout: float, outputs: int, copies: int = 1) -> None:
        self.command, self.timeout, self.outputs = command, timeout, outputs
        self.others = [Simulator(command, timeout, outputs) for _ in range(copies - 1)]
        self.__name__ = PurePath(command[-1]).name
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None

    def __repr__(self) -> str:
        running = sum(one._process is not None for one in (self, *self.others))
        return f"<Simulator {' '.join(self.command)}: {running} of {1 + len(self.others)} running>"

    def __call__(self, *given: Any) -> Any:
        from numpy import asarray  # noqa: PLC0415  # the core does not need NumPy

        arrays = [asarray(a) for a in given]  # tensors, too: of a box without numpy=True
        if not self.others:
            return self._ask(arrays)
        samples = {a.shape[0] for a in arrays if a.ndim}
        if len(samples) != 1:
            shapes = [a.shape for a in arrays]
            raise InputError(
                f"several copies divide the samples of a call; expected arrays of one batch size, got shapes {shapes}"
            )
        return self._divided(arrays, samples.pop())

    def _divided(self, arrays: Sequence[Any], samples: int) -> Any:
        """Each copy a share of the samples; the first error of all is raised."""
        from numpy import concatenate  # noqa: PLC0415  # the core does not need NumPy

        copies = [self, *self.others]
        for copy in copies:
            copy.timeout = self.timeout
        share = -(-samples // len(copies))
        cuts = [(k, min(k + share, samples)) for k in range(0, samples, share)]
        with ThreadPoolExecutor(len(cuts)) as threads:
            asked = [
                threads.submit(copy._ask, [a[start:stop] if a.ndim else a for a in arrays])
                for copy, (start, stop) in zip(copies, cuts, strict=False)
            ]
        results = [future.result() for future in asked]
        if self.outputs == 1:
            return concatenate(results)
        return tuple(concatenate(parts) for parts in zip(*results, strict=True))

    def _ask(self, arrays: Sequence[Any], tries: int = 0) -> Any:
        process = self._running()
        try:
            results = call_within(self.timeout, lambda: self._exchange(process, arrays), ())
        except QueryTimeoutError:
            self._end()
            raise QueryTimeoutError(
                f"{self.command[0]} gave no answer within {self.timeout:g} seconds and was stopped; allow more "
                "(timeout=), or find out what it waits for"
            ) from None
        except (OSError, ValueError, EOFError) as error:
            killed, what = self._what_happened(process, error)
            if killed and tries < _RETRIES:  # not the program's own end: by the system, or by hand
                return self._ask(arrays, tries + 1)
            again = f" (asked {tries + 1} times)" if tries else ""
            raise QueryError(what + again) from None
        except BaseException:
            self._end()  # what is left of an answer must not be taken for the next one
            raise
        return results[0] if self.outputs == 1 else tuple(results)

    def close(self) -> None:
        """End the program, if it runs."""
        for other in getattr(self, "others", ()):
            other.close()
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what it no longer reads is lost
                    if pipe is not None:
                        pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            if self._complaints is not None:
                self._complaints.close()
            self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the program runs
            pipe = subprocess.PIPE
            try:
                self._process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=self._complaints)
            except OSError as error:
                raise QueryError(f"{self.command[0]} cannot be started: {error}; check the command") from error
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], arrays: Sequence[Any]) -> list[Any]:
        from numpy.lib.format import read_array, write_array  # noqa: PLC0415  # the core does not need NumPy

        assert process.stdin is not None
        assert process.stdout is not None
        # NumPy takes a file for one that it can seek in; of these it sees the one method.
        sink, source = SimpleNamespace(write=process.stdin.write), SimpleNamespace(read=process.stdout.read)
        for array in arrays:
            write_array(sink, array, allow_pickle=False)
        process.stdin.flush()
        return [read_array(source, allow_pickle=False) for _ in range(self.outputs)]

    def _what_happened(self, process: subprocess.Popen[bytes], error: Exception) -> tuple[bool, str]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)  # a pipe breaks a moment before its process has ended
        code = process.poll()
        words = b""
        if self._complaints is not None:
            size = self._complaints.seek(0, 2)
            self._complaints.seek(max(0, size - _LAST_WORDS))
            words = self._complaints.read()
        said = words.decode(errors="replace").strip()
        self._end()
        if code is None:
            return False, (
                f"{self.command[0]} wrote something else than {self.outputs} array(s) in .npy format to its standard "
                f"output ({error}) and was stopped; messages belong to its standard error"
            )
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return code < 0, f"{self.command[0]} {how} before it answered; its last words: {said or 'none'}"

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_complaints": None}

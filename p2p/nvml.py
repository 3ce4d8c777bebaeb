"""Asks NVML, and makes a `Reading` of the answers. The library itself is behind a seam of five calls.

`Nvml` is that seam. `Library` is the real one (`pynvml`, imported when it is first opened); `Recorded` replays a file
through the very same reading, so that machines without a GPU run the code that machines with one run; ``python -m
p2p.nvml > recording.json`` records this machine. Every call may block for as long as a sick driver likes: only
`p2p.gpu_sampler`'s thread makes them. What it means for a GPU's health is `p2p.gpus`.

Sources: NVML API reference, https://docs.nvidia.com/deploy/nvml-api/; a question that a GPU, a driver or a permission
does not support is an answer that is not told, never a failure.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from p2p.gpus import Gpu, Holder, Reading

MIB = 1 << 20
MAX_LINKS = 18  # NVML_NVLINK_MAX_LINKS
SWITCH = 2  # NVML_NVLINK_DEVICE_TYPE_SWITCH: behind it are all GPUs that have links to one
MAX_EVENTS = 64  # taken in one look; more come with the next
HUNG_POLL_SECONDS = 0.05

# nvmlReturn_t
INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 2, 3, 4, 6
FUNCTION_NOT_FOUND, VERSION_MISMATCH, NOT_READY = 13, 25, 27
UNTOLD = {INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, FUNCTION_NOT_FOUND, VERSION_MISMATCH, NOT_READY}


class NvmlAbsent(Exception):
    """There is no NVIDIA driver on this machine."""


class NvmlError(Exception):
    """NVML answers with an error; `code` is its nvmlReturn_t."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(text or f"NVML error {code}")
        self.code = code


class Nvml(Protocol):
    """`ask` calls the NVML function of that name. Answers are plain: numbers, texts, dicts of fields, lists, handles.
    Raises NvmlError."""

    def open(self) -> None:
        """Raises NvmlAbsent where there is no driver."""

    def close(self) -> None: ...
    def ask(self, question: str, *arguments: Any) -> Any: ...

    def numa_node(self, bus: str) -> int:
        """Of the device at this PCI address, by the kernel's word; -1 if it has none."""

    def xids(self, watched: dict[str, Any]) -> list[tuple[str, int]]:
        """(uuid, Xid) of the critical errors since the last call, of the GPUs `watched` (uuid -> handle)."""


class _Fixed(NamedTuple):
    """What does not change while a GPU is there: asked once."""

    model: str
    compute_capability: str
    bus: str
    numa_node: int
    remotes: frozenset[str]  # PCI addresses at the other ends of its NVLinks; "switch" for an NVSwitch


class NvmlReader:
    """`read` is one look; it opens NVML when it has to. One thread at a time."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self._is_open = False
        self._fixed: dict[str, _Fixed] = {}
        self._uuids: dict[int, str] = {}  # by index: a GPU that is lost does not tell its own any more
        self._since: dict[str, int] = {}  # the newest utilisation sample by GPU, microseconds
        self._watched: dict[str, Any] = {}

    def read(self) -> Reading:
        """Never raises for what NVML says."""
        try:
            if not self._is_open:
                self._nvml.open()
                self._is_open = True
            return self._read()
        except NvmlAbsent:
            return Reading()
        except NvmlError as error:
            self.close()  # the next look begins afresh: a reloaded driver needs that
            return Reading(error=f"NVML: {error}")

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._watched.clear()
            try:
                self._nvml.close()
            except NvmlError:
                pass  # what is broken is closed too

    def _read(self) -> Reading:
        ask = self._nvml.ask
        found: list[Gpu] = []
        for n in range(ask("nvmlDeviceGetCount")):
            try:
                handle = ask("nvmlDeviceGetHandleByIndex", n)
                uuid = self._uuids[n] = ask("nvmlDeviceGetUUID", handle)
                found += self._device(uuid, handle)
            except NvmlError as error:
                uuid = self._uuids.get(n, f"GPU-at-index-{n}")
                fixed = self._fixed.get(uuid)
                model = fixed.model if fixed is not None else "unknown"
                found.append(Gpu(uuid=uuid, model=model, fault=f"NVML: {error}"))
        xids: dict[str, list[int]] = {}
        for uuid, number in self._nvml.xids(self._watched):
            xids.setdefault(uuid, []).append(number)
        cuda = self._told("nvmlSystemGetCudaDriverVersion")
        return Reading(
            gpus=tuple(self._finish(gpu, tuple(xids.get(gpu.parent or gpu.uuid, ()))) for gpu in found),
            driver=self._told("nvmlSystemGetDriverVersion"),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda is not None else None,
        )

    def _finish(self, gpu: Gpu, xids: tuple[int, ...]) -> Gpu:
        """With what is known only when all GPUs have been looked at."""
        fixed = self._fixed.get(gpu.uuid)
        links: tuple[str, ...] = ()
        if fixed is not None and fixed.remotes:
            links = tuple(
                uuid
                for uuid, other in sorted(self._fixed.items())
                if uuid != gpu.uuid
                and (other.bus in fixed.remotes or ("switch" in fixed.remotes and "switch" in other.remotes))
            )
        return replace(gpu, links=links, xids=xids)

    def _told(self, question: str, *arguments: Any) -> Any:
        """None for what is not supported."""
        try:
            return self._nvml.ask(question, *arguments)
        except NvmlError as error:
            if error.code in UNTOLD:
                return None
            raise

    def _first_told(self, questions: tuple[str, ...], *arguments: Any) -> Any:
        return next((told for name in questions if (told := self._told(name, *arguments)) is not None), None)

    # -- one GPU -----------------------------------------------------------------------------------------------------

    def _device(self, uuid: str, handle: Any) -> list[Gpu]:
        """The GPU, or in its place the MIG instances that it is divided into."""
        fixed = self._fixed.get(uuid) or self._fixed.setdefault(uuid, self._ask_fixed(handle))
        self._watched.setdefault(uuid, handle)
        mode = self._told("nvmlDeviceGetMigMode", handle)
        shared = self._shared(handle)
        if not mode or not mode[0]:
            whole = self._part(handle, uuid=uuid, model=fixed.model, numa_node=fixed.numa_node, **shared)
            return [self._with_use(whole, handle)]
        parts = []
        for n in range(self._told("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            part = self._told("nvmlDeviceGetMigDeviceHandleByIndex", handle, n)
            if part is not None:
                name = str(self._nvml.ask("nvmlDeviceGetUUID", part))
                model = str(self._told("nvmlDeviceGetName", part) or f"{fixed.model} MIG")
                part_of = {"uuid": name, "model": model, "numa_node": fixed.numa_node, "parent": uuid}
                parts.append(self._part(part, **part_of, **shared))
        return parts

    def _ask_fixed(self, handle: Any) -> _Fixed:
        bus = str(self._nvml.ask("nvmlDeviceGetPciInfo", handle)["busId"]).lower()
        major_minor = self._told("nvmlDeviceGetCudaComputeCapability", handle) or (0, 0)
        numa = self._told("nvmlDeviceGetNumaNodeId", handle)
        return _Fixed(
            model=str(self._nvml.ask("nvmlDeviceGetName", handle)),
            compute_capability="{}.{}".format(*major_minor),
            bus=bus,
            numa_node=numa if numa is not None else self._nvml.numa_node(bus),
            remotes=frozenset(self._remotes(handle)),
        )

    def _remotes(self, handle: Any) -> set[str]:
        found = set()
        for link in range(MAX_LINKS):
            active = self._told("nvmlDeviceGetNvLinkState", handle, link)
            if active is None:
                break  # it has no (more) links
            if not active:
                continue
            if self._told("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link) == SWITCH:
                found.add("switch")
            elif (remote := self._told("nvmlDeviceGetNvLinkRemotePciInfo", handle, link)) is not None:
                found.add(str(remote["busId"]).lower())
        return found

    def _shared(self, handle: Any) -> dict[str, Any]:
        """What a GPU tells for itself and for its MIG instances."""
        remapped = self._told("nvmlDeviceGetRemappedRows", handle)
        major_minor = self._told("nvmlDeviceGetCudaComputeCapability", handle) or (0, 0)
        return {
            "compute_capability": "{}.{}".format(*major_minor),
            "temperature": self._told("nvmlDeviceGetTemperature", handle, 0),
            "uncorrected": self._told("nvmlDeviceGetTotalEccErrors", handle, 1, 0),  # uncorrected, since the last reset
            "remap_failed": bool(remapped and remapped[3]),
        }

    def _part(self, handle: Any, **known: Any) -> Gpu:
        memory = self._told("nvmlDeviceGetMemoryInfo_v2", handle)
        if memory is None:
            memory = self._nvml.ask("nvmlDeviceGetMemoryInfo", handle)
        reserved = memory.get("reserved", 0)
        return Gpu(
            memory_mb=memory["total"] // MIB,
            reserved_mb=reserved // MIB,
            used_mb=max(memory["total"] - memory["free"] - reserved, 0) // MIB,
            holders=self._holders(handle),
            **known,
        )

    def _holders(self, handle: Any) -> tuple[Holder, ...]:
        memory: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics", "MPSCompute"):
            base = f"nvmlDeviceGet{kind}RunningProcesses"
            for told in self._first_told((base, f"{base}_v2"), handle) or ():
                used = told["usedGpuMemory"]
                before = memory.get(told["pid"])
                memory[told["pid"]] = max(used // MIB, before or 0) if used is not None else before
        return tuple(Holder(pid, used) for pid, used in sorted(memory.items()))

    def _with_use(self, gpu: Gpu, handle: Any) -> Gpu:
        """With its utilisation, and each process's where NVML samples that."""
        rates = self._told("nvmlDeviceGetUtilizationRates", handle)
        samples = self._told("nvmlDeviceGetProcessUtilization", handle, self._since.get(gpu.uuid, 0)) or ()
        busy: dict[int, float] = {}
        for sample in samples:
            busy[sample["pid"]] = max(busy.get(sample["pid"], 0.0), float(min(sample["smUtil"], 100)))
            self._since[gpu.uuid] = max(self._since.get(gpu.uuid, 0), sample["timeStamp"])
        known = {holder.pid: holder for holder in gpu.holders}
        if busy:
            known = {pid: holder._replace(utilization=busy.get(pid, 0.0)) for pid, holder in known.items()}
            known |= {pid: Holder(pid, 0, use) for pid, use in busy.items() if pid not in known}
        return replace(
            gpu,
            utilization=float(rates["gpu"]) if rates is not None else None,
            holders=tuple(known[pid] for pid in sorted(known)),
        )


# -- the library -------------------------------------------------------------------------------------------------------


class Library:
    """NVML by pynvml."""

    def __init__(self) -> None:
        self._nvml: ModuleType | None = None
        self._events: Any = None
        self._registered: dict[int, str] = {}  # the handle's address -> uuid: a lost GPU does not tell its own

    def open(self) -> None:
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            raise NvmlAbsent from None
        except pynvml.NVMLError as error:
            raise NvmlError(error.value, str(error)) from None

    def close(self) -> None:
        if self._events is not None:
            self.ask("nvmlEventSetFree", self._events)
            self._events = None
        self._registered.clear()
        self.ask("nvmlShutdown")

    def ask(self, question: str, *arguments: Any) -> Any:
        assert self._nvml is not None, "open it first"
        if question == "nvmlDeviceGetMemoryInfo_v2":
            question, arguments = "nvmlDeviceGetMemoryInfo", (*arguments, self._nvml.nvmlMemory_v2)
        function = getattr(self._nvml, question, None)
        if function is None:
            raise NvmlError(FUNCTION_NOT_FOUND, f"this pynvml has no {question}")
        try:
            return _plain(function(*arguments))
        except self._nvml.NVMLError as error:
            raise NvmlError(error.value, str(error)) from None
        except self._nvml.NVMLLibraryMismatchError as error:  # the driver is older than this function
            raise NvmlError(FUNCTION_NOT_FOUND, str(error)) from None

    def numa_node(self, bus: str) -> int:
        domain, _, rest = bus.partition(":")  # NVML writes the domain with eight digits, the kernel with four
        try:
            return int(Path(f"/sys/bus/pci/devices/{domain[-4:]}:{rest}/numa_node").read_text())
        except (OSError, ValueError):
            return -1

    def xids(self, watched: dict[str, Any]) -> list[tuple[str, int]]:
        assert self._nvml is not None, "open it first"
        critical = int(self._nvml.nvmlEventTypeXidCriticalError)
        try:
            self._register(watched, critical)
        except NvmlError:
            return []  # not on this GPU, or not for this user
        found: list[tuple[str, int]] = []
        while self._events is not None and len(found) < MAX_EVENTS:
            try:
                told = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except self._nvml.NVMLError:
                break  # NVML_ERROR_TIMEOUT: there are no more. A lost GPU is seen by its other answers
            uuid = self._registered.get(_address(told.device))
            if uuid is not None and told.eventType & critical:
                found.append((uuid, int(told.eventData)))
        return found

    def _register(self, watched: dict[str, Any], critical: int) -> None:
        missing = {uuid: handle for uuid, handle in watched.items() if uuid not in self._registered.values()}
        for uuid, handle in missing.items():
            self._registered[_address(handle)] = uuid
            if not self.ask("nvmlDeviceGetSupportedEventTypes", handle) & critical:
                continue
            if self._events is None:
                self._events = self.ask("nvmlEventSetCreate")
            self.ask("nvmlDeviceRegisterEvents", handle, critical, self._events)


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _plain(value: Any) -> Any:
    """pynvml's structures and bytes as dicts and texts; handles stay what they are."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, ctypes.Structure):
        return {field[0]: _plain(getattr(value, field[0])) for field in value._fields_}
    if type(value).__name__ == "nvmlFriendlyObject":
        return {name: _plain(item) for name, item in vars(value).items()}
    return value


# -- recordings --------------------------------------------------------------------------------------------------------


class Recorded:
    """A recording in place of the library: a JSON object of answers by question, those of each GPU under ``devices``
    and of its MIG instances under its ``mig``; a question with arguments beyond the handle may name them, as
    ``nvmlDeviceGetNvLinkState(0)``. ``{"error": 15}`` is that nvmlReturn_t; what is left out is not supported. ``xids``
    of a GPU are told once each, ``numa_node`` is the kernel's word. The file is read again whenever it changes, and
    while it says ``"hangs": true`` no question is answered."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._body: dict[str, Any] = {}
        self._told: dict[str, int] = {}

    def open(self) -> None:
        self._refresh()

    def close(self) -> None: ...

    def ask(self, question: str, *arguments: Any) -> Any:
        self._refresh()
        while self._body.get("hangs"):
            time.sleep(HUNG_POLL_SECONDS)
            self._refresh()
        if question == "nvmlDeviceGetCount":
            return _answer(self._body.get(question, len(self._devices)), question)
        if question == "nvmlDeviceGetHandleByIndex":
            device = self._devices[arguments[0]]
            _answer(device.get(question, 0), question)
            return device
        if question == "nvmlDeviceGetMigDeviceHandleByIndex":
            device, n = arguments
            parts = device.get("mig", [])
            if n >= len(parts):
                raise NvmlError(NOT_FOUND, "Not Found")
            return parts[n]
        where = self._body
        if arguments and isinstance(arguments[0], dict):
            where, arguments = arguments[0], arguments[1:]
        exact = f"{question}({','.join(map(str, arguments))})"
        return _answer(where.get(exact, where.get(question, {"error": NOT_SUPPORTED})), question)

    @property
    def _devices(self) -> list[dict[str, Any]]:
        devices: list[dict[str, Any]] = self._body.get("devices", [])
        return devices

    def numa_node(self, bus: str) -> int:
        by_bus = {str(_maybe(device, "nvmlDeviceGetPciInfo").get("busId")).lower(): device for device in self._devices}
        return int(by_bus.get(bus, {}).get("numa_node", -1))

    def xids(self, watched: dict[str, Any]) -> list[tuple[str, int]]:
        found = []
        for device in self._devices:
            uuid, numbers = str(device.get("nvmlDeviceGetUUID")), device.get("xids", [])
            found += [(uuid, number) for number in numbers[self._told.get(uuid, 0) :] if uuid in watched]
            self._told[uuid] = len(numbers)
        return found

    def _refresh(self) -> None:
        try:
            stat = self._path.stat()
            if (stamp := (stat.st_mtime_ns, stat.st_ino)) != self._stamp:
                body = json.loads(self._path.read_text(encoding="utf-8"))
                if not isinstance(body, dict):
                    raise ValueError("it is no JSON object")
                self._body, self._stamp = body, stamp
        except (OSError, ValueError) as error:
            raise NvmlError(999, f"the recording {self._path} cannot be read: {error}") from None


def _answer(value: Any, question: str) -> Any:
    if isinstance(value, dict) and "error" in value:
        raise NvmlError(value["error"], value.get("text") or f"{question}: error {value['error']}")
    return value


def _maybe(device: dict[str, Any], question: str) -> dict[str, Any]:
    value = device.get(question)
    return value if isinstance(value, dict) else {}


class _Taped(NamedTuple):
    """A handle whose answers are noted."""

    handle: Any
    notes: dict[str, Any]


class Recorder:
    """Passes every question on to the library and notes the answer."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self.body: dict[str, Any] = {"devices": []}
        self.open, self.close = nvml.open, nvml.close

    def ask(self, question: str, *arguments: Any) -> Any:
        taped = arguments[0] if arguments and isinstance(arguments[0], _Taped) else None
        notes = taped.notes if taped is not None else self.body
        passed = (taped.handle, *arguments[1:]) if taped is not None else arguments
        own = passed[1:] if taped is not None else passed
        key = f"{question}({','.join(map(str, own))})" if own and "ProcessUtil" not in question else question
        try:
            told = self._nvml.ask(question, *passed)
        except NvmlError as error:
            if "Handle" not in question:
                notes[key] = {"error": error.code, "text": str(error)}
            raise
        if question in ("nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMigDeviceHandleByIndex"):
            within = notes["devices"] if taped is None else notes.setdefault("mig", [])
            within.append({})
            return _Taped(told, within[-1])
        notes[key] = told
        return told

    def numa_node(self, bus: str) -> int:
        node = self._nvml.numa_node(bus)
        for device in self.body["devices"]:
            if str(_maybe(device, "nvmlDeviceGetPciInfo").get("busId")).lower() == bus:
                device["numa_node"] = node
        return node

    def xids(self, watched: dict[str, Any]) -> list[tuple[str, int]]:
        return self._nvml.xids({uuid: taped.handle for uuid, taped in watched.items()})


def record(nvml: Nvml) -> dict[str, Any]:
    """One look at this machine, in the form that `Recorded` replays. Raises NvmlAbsent or NvmlError."""
    recorder = Recorder(nvml)
    recorder.open()
    try:
        reading = NvmlReader(_Opened(recorder)).read()
        if reading.error is not None:
            raise NvmlError(999, reading.error)
    finally:
        recorder.close()
    return recorder.body


class _Opened:
    """An Nvml that somebody else opens and closes."""

    def __init__(self, nvml: Nvml) -> None:
        self.ask, self.numa_node, self.xids = nvml.ask, nvml.numa_node, nvml.xids

    def open(self) -> None: ...
    def close(self) -> None: ...


def main(write: Callable[[str], Any] = sys.stdout.write) -> int:
    """Writes a recording of this machine's GPUs."""
    try:
        body = record(Library())
    except NvmlAbsent:
        sys.stderr.write("there is no NVIDIA driver on this machine\n")
        return 1
    except NvmlError as error:
        sys.stderr.write(f"NVML: {error}\n")
        return 1
    write(json.dumps(body, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

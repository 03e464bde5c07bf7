"""`scripts/bench probe`: whether the tool that measures is ever the bottleneck."""

import json
import os
import shutil
import statistics
import subprocess
import sys

import pages

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.environ.get("MARTLET_BUILD", os.path.join(ROOT, ".build/release"))
PROBE = os.path.join(BUILD, "martlet-probe")

BAR_REQUESTS, BAR_REQUEST_NS = 4e6, 250
BAR_FRAMES = 20e6

said = []


def say(line):
    print(line, flush=True)
    said.append(line)


def block(rounds, seconds):
    """4 KiB reads at depth 32 from qemu-storage-daemon's null-co, both spinning, each on a processor of its own."""
    if not shutil.which("qemu-storage-daemon"):
        say("block: not measured, qemu-storage-daemon is not installed (Debian: qemu-system-common or qemu-utils)")
        return 2
    command = [
        PROBE, "bench", "--output-format", "json", "--rw", "randread", "--bs", "4k", "--iodepth", "32", "--size", "32m", "--wait",
        "spin", "--pin", "0", "--pin-backend", "1", "--no-syscalls", "--runtime", str(seconds), "--rounds", str(rounds), "--",
        "qemu-storage-daemon", "--blockdev", "null-co,node-name=n,size=1073741824,read-zeroes=off", "--object",
        "iothread,id=io,poll-max-ns=1000000", "--export",
        "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={socket},writable=on,iothread=io"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        say(f"block: not measured: {run.stderr.strip()}")
        return 2
    jobs = json.loads(run.stdout)["jobs"]
    rates = [job["read"]["iops"] for job in jobs]
    own = [job["martlet"] for job in jobs]
    # What a request costs the tool when it does not wait for the back end.
    costs = [m["tool_cpu_ns_per_request"] * (1 - m["tool_waiting_percent"] / 100) for m in own]
    say(f"block: 4 KiB random reads, depth 32, null-co of qemu-storage-daemon, both spinning, {rounds} rounds of {seconds} s")
    say(f"  requests a second   best {max(rates) / 1e6:.2f} M, median {statistics.median(rates) / 1e6:.2f} M, "
          f"least {min(rates) / 1e6:.2f} M")
    say(f"  the tool            {statistics.median(costs):.0f} ns of work a request (median); it waited for the back end "
          f"{statistics.median(m['tool_waiting_percent'] for m in own):.0f} % of the time")
    say(f"  the back end        {statistics.median(m['back_end_cpu_ns_per_request'] for m in own):.0f} ns of processor time a "
          f"request, {statistics.median(m['back_end_cpu_percent'] for m in own):.0f} % of its processor")
    fast = max(rates) >= BAR_REQUESTS
    cheap = statistics.median(costs) <= BAR_REQUEST_NS
    say(f"  {'ok ' if fast else 'BAD'} at least {BAR_REQUESTS / 1e6:.0f} M requests a second in the best round")
    say(f"  {'ok ' if cheap else 'BAD'} at most {BAR_REQUEST_NS} ns of the tool's work a request")
    return 0 if fast and cheap else 1


def network(rounds, seconds):
    """64-byte frames into, out of and through DPDK's testpmd with its vhost device, both spinning."""
    if not shutil.which("dpdk-testpmd"):
        say("net: not measured, dpdk-testpmd is not installed (Debian: dpdk-dev)")
        return 2
    if os.geteuid() != 0:
        say("net: not measured, dpdk-testpmd wants root")
        return 2
    say(f"net: 64-byte frames, dpdk-testpmd with net_vhost, both spinning, {rounds} rounds of {seconds} s")
    best = {}
    for mode, forward in (("send", "rxonly"), ("receive", "txonly"), ("loop", "io")):
        command = [
            PROBE, "bench", "--type", "net", "--output-format", "json", "--mode", mode, "--frame-size", "64", "--wait", "spin", "--pin",
            "0", "--no-syscalls", "--timeout", "15", "--runtime", str(seconds), "--rounds", str(rounds), "--", "dpdk-testpmd",
            "--no-huge", "-m", "512", "--no-pci", "--no-telemetry", "--file-prefix", f"probe{os.getpid()}", "--lcores", "0@1,1@1",
            "--vdev", "net_vhost0,iface={socket},queues=1", "--", f"--forward-mode={forward}", "--stats-period", "3600",
            "--total-num-mbufs=16384"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            say(f"  {mode}: not measured: {run.stderr.strip()}")
            return 2
        jobs = json.loads(run.stdout)["jobs"]
        rates = [job["martlet"]["requests_per_s"] for job in jobs]
        best[mode] = max(rates)
        line = (f"  {mode:8} best {max(rates) / 1e6:5.2f}, median {statistics.median(rates) / 1e6:5.2f}, least {min(rates) / 1e6:5.2f} M/s; "
                f"waited {statistics.median(job['martlet']['tool_waiting_percent'] for job in jobs):.0f} %")
        if mode == "loop":
            line += f"; round trip {statistics.median(job['read']['clat_ns']['percentile']['50.000000'] for job in jobs) / 1e3:.1f} us"
        say(line)
    fast = best["send"] >= BAR_FRAMES
    say(f"  {'ok ' if fast else 'BAD'} at least {BAR_FRAMES / 1e6:.0f} M frames a second into it in the best round")
    return 0 if fast else 1


def run(arguments):
    if not os.access(PROBE, os.X_OK):
        sys.exit(f"scripts/bench: {PROBE} is missing; run: swift build -c release --disable-local-rpath")
    if os.cpu_count() < 2:
        print("scripts/bench probe needs two processors")
        return 2
    say(f"{pages.machine()}, load {os.getloadavg()[0]:.1f} before")
    results = [block(arguments.runs, arguments.seconds), network(arguments.runs, arguments.seconds)]
    if arguments.docs:
        words = ["scripts/bench probe", f"--runs {arguments.runs}", f"--seconds {arguments.seconds:g}", "--docs"]
        pages.write_docs("probe", "$ " + " ".join(words) + "\n" + "\n".join(said))
    return max(results)

import Foundation
import Probe
import TestSupport
import Testing

/// Other people's tools at a back end, through the bridge: that they work is what it is for.
@Suite("Probe: bridge and the tools it is made for", .serialized)
struct BridgeToolsTests {
  private static let probe = BuiltPrograms.path("martlet-probe")
  private static let testpmd = "/usr/bin/dpdk-testpmd"
  private static let canMakeTaps = geteuid() == 0 && access("/dev/net/tun", F_OK) == 0 && isThere("unshare")

  private static func isThere(_ programs: String...) -> Bool { programs.allSatisfy { access("/usr/bin/" + $0, X_OK) == 0 } }

  private static func scratch() throws -> String {
    let path = NSTemporaryDirectory() + "probe-tools-\(UUID().uuidString.prefix(8))"
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    return path
  }

  /// A script with a network of its own and taps in it; its end takes along whatever it started.
  private static func script(_ place: String, _ text: String) throws -> ProgramResult {
    // A missing tap driver is 99, what never comes 97.
    let common = """
      cd \(place) || exit 98
      await() { for i in $(seq 600); do grep -q "$1" "$2" 2>/dev/null && return; sleep 0.1; done; echo "no '$1' in $2: $(cat "$2")"; exit 97; }
      tap() { ip tuntap add "$1" mode tap vnet_hdr && ip link set "$1" up || exit 99; }
      ip link set lo up || exit 99

      """
    return try RunningProgram("/usr/bin/unshare", ["-n", "-p", "-f", "--kill-child", "--mount-proc", "/bin/bash", "-c", common + text])
      .wait(seconds: 150)
  }

  /// Frames of an experimental type, every length from the shortest on, each with its number in it.
  private static func frames(_ count: Int) -> [PcapFile.Frame] {
    (0..<count).map { number in
      let head: [UInt8] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xB5, UInt8(number >> 8), UInt8(number & 255)]
      let body = (0..<44 + number * 5 % 1440).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ number) }
      return PcapFile.Frame(nanoseconds: UInt64(number) * 1_000_000, bytes: head + body)
    }
  }

  private static func write(_ frames: [PcapFile.Frame], to path: String) throws {
    try Data(PcapFile.header + frames.flatMap(PcapFile.record)).write(to: URL(fileURLWithPath: path))
  }

  /// The frames of that type in a capture file.
  private static func read(_ path: String) throws -> [[UInt8]] {
    let bytes = Array(try Data(contentsOf: URL(fileURLWithPath: path)))
    return try PcapFile.read(bytes, name: path).map(\.bytes).filter { $0.count > 14 && $0[12] == 0x88 && $0[13] == 0xB5 }
  }

  @Test(
    "What tcpreplay plays at one side of a bridge and a card, tcpdump hears at the other; and it reads what the bridge captured",
    .enabled(
      if: canMakeTaps && isThere("tcpreplay", "tcpdump"),
      "Needs root, /dev/net/tun, tcpreplay and tcpdump (Debian's packages of those names)."))
  func captures() throws {
    let place = try Self.scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    let frames = Self.frames(300)
    try Self.write(frames, to: place + "/play")
    let result = try Self.script(
      place,
      """
      tap t0; tap t1
      \(Self.probe) bridge --tap t1 --pcap-out bridged -- \(BuiltPrograms.path("martlet-net")) --socket-path {socket} --tap t0 2>said & bridge=$!
      await agreed said
      for way in "t1 t0" "t0 t1"; do
        set -- $way
        timeout 60 tcpdump -i $2 -c 300 -U -w heard-$2 ether proto 0x88b5 2>log-$2 & dump=$!
        await listening log-$2
        tcpreplay -q -i $1 --pps=3000 play >played 2>&1 || { cat played; exit 1; }
        wait $dump || { cat log-$2; exit 2; }
      done
      kill -INT $bridge; wait $bridge || exit 3
      tcpdump -r bridged -w again ether proto 0x88b5 2>&1 || exit 4
      """)
    guard result.code != 99 else { return }
    #expect(result.code == 0, "\(result.output) \(result.errors)")
    for name in ["heard-t0", "heard-t1"] { #expect(try Self.read("\(place)/\(name)") == frames.map(\.bytes), "\(name)") }
    // Both ways, in the order in which they passed; and the same to tcpdump.
    #expect(try Self.read(place + "/bridged") == (frames + frames).map(\.bytes))
    #expect(try Self.read(place + "/again") == (frames + frames).map(\.bytes))
  }

  @Test(
    "A capture file goes through testpmd's net_vhost and comes back whole in another",
    .enabled(if: geteuid() == 0 && access(testpmd, X_OK) == 0, "Needs root and dpdk-testpmd (Debian's dpdk-dev)."))
  func captureFilesThroughTestpmd() throws {
    let place = try Self.scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    let frames = Self.frames(200)
    try Self.write(frames, to: place + "/in")
    let result = try RunningProgram(
      Self.probe,
      ["bridge", "--type", "net", "--timeout", "30", "--linger", "3", "--pcap-in", place + "/in", "--pcap-out", place + "/out", "--"]
        + Self.testpmd(["{socket}"])
    ).wait(seconds: 120)
    #expect(result.code == 0, "\(result.errors)")
    let passed = try Self.read(place + "/out")
    // Those that were sent and those that came back, each in order.
    #expect(passed.count == 2 * frames.count, "\(result.errors)")
    for (number, frame) in frames.enumerated() {
      #expect(passed.count { $0 == frame.bytes } == 2, "frame \(number)")
    }
  }

  /// testpmd with a port at each socket, which passes on between two, and back with one.
  private static func testpmd(_ sockets: [String]) -> [String] {
    let prefix = "probe-\(UUID().uuidString.prefix(8))"
    return [testpmd, "--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--file-prefix", prefix, "--lcores", "0@0,1@1"]
      + sockets.enumerated().flatMap { ["--vdev", "net_vhost\($0.offset),iface=\($0.element),queues=1"] }
      + ["--", "--forward-mode=io", "--stats-period", "3600", "--total-num-mbufs=8192"]
  }

  @Test(
    "iperf3 measures through bridge and card, and tcpdump sees its stream",
    .enabled(
      if: canMakeTaps && isThere("iperf3", "tcpdump"), "Needs root, /dev/net/tun, iperf3 and tcpdump (Debian's packages of those names)."))
  func iperf() throws {
    try Self.iperf(
      """
      \(Self.probe) bridge --tap t1 -- \(BuiltPrograms.path("martlet-net")) --socket-path {socket} --tap t0 2>said & bridges=$!
      await agreed said
      """)
  }

  @Test(
    "iperf3 measures from tap to tap through two bridges and DPDK's net_vhost between them",
    .enabled(
      if: canMakeTaps && isThere("iperf3", "tcpdump") && access(testpmd, X_OK) == 0,
      "Needs root, /dev/net/tun, iperf3, tcpdump and dpdk-testpmd (Debian's dpdk-dev)."))
  func iperfThroughTestpmd() throws {
    try Self.iperf(
      """
      \(Self.testpmd(["v0", "v1"]).joined(separator: " ")) >pmd 2>&1 </dev/null &
      for i in $(seq 300); do [ -e v1 ] && break; sleep 0.1; done
      \(Self.probe) bridge --tap t0 --type net --timeout 30 --socket v0 2>said & bridges=$!
      \(Self.probe) bridge --tap t1 --type net --timeout 30 --socket v1 2>other & bridges="$bridges $!"
      await agreed said; await agreed other
      """)
  }

  /// - Parameter joining: what joins t0 and t1; `bridges` are its processes that end by an interruption.
  private static func iperf(_ joining: String) throws {
    let place = try scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    let result = try script(
      place,
      """
      tap t0; tap t1
      ip addr add 10.9.0.1/24 dev t0
      \(joining)
      unshare -n sleep 140 & other=$!
      # The one whose network is to be another than ours, once it is.
      for i in $(seq 300); do [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break; sleep 0.1; done
      ip link set t1 netns $other || exit 1
      nsenter -t $other -n sh -c 'ip addr add 10.9.0.2/24 dev t1; ip link set t1 up'
      timeout 100 tcpdump -i t0 -c 100 -s 96 -U -w heard tcp port 5201 2>log & dump=$!
      iperf3 -s -1 -B 10.9.0.1 --forceflush >served 2>&1 & server=$!
      await listening log; await listening served
      nsenter -t $other -n timeout 90 iperf3 -c 10.9.0.1 -n 16M -J >measured 2>&1 || { cat measured; exit 2; }
      wait $server
      wait $dump || exit 4
      kill -INT $bridges
      for bridge in $bridges; do wait $bridge || exit 3; done
      tcpdump -r heard 2>/dev/null | wc -l
      """)
    guard result.code != 99 else { return }
    #expect(result.code == 0, "\(result.output) \(result.errors)")
    #expect((Int(result.output.trimmingCharacters(in: .whitespacesAndNewlines)) ?? 0) >= 100, "\(result.output)")
    let measured = try JSONSerialization.jsonObject(with: Data(contentsOf: URL(fileURLWithPath: place + "/measured"))) as? [String: Any]
    let received = ((measured?["end"] as? [String: Any])?["sum_received"] as? [String: Any])?["bytes"] as? Int
    // What is on its way when the sender is done is not counted.
    #expect((received ?? 0) >= 4 << 20, "\(String(describing: received))")
  }

  @Test(
    "fio's nbd engine writes a disk through the bridge, and finds there what it wrote",
    .enabled(if: isThere("fio"), "Needs fio with its nbd engine (Debian's fio)."))
  func fio() throws {
    // Some are built without it.
    guard try RunningProgram("/usr/bin/fio", ["--enghelp"]).wait().output.contains("nbd") else { return }
    let place = try Self.scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    #expect(FileManager.default.createFile(atPath: place + "/disk", contents: Data(count: 16 << 20)))
    let block = BuiltPrograms.path("martlet-block")
    let bridge = try RunningProgram(
      Self.probe, ["bridge", "--nbd", place + "/n", "--", block, "--socket-path", "{socket}", "--blk-file", place + "/disk"])
    let patience = Date().addingTimeInterval(60)
    while access(place + "/n", F_OK) != 0, bridge.isRunning, Date() < patience { usleep(10_000) }
    let words = [
      "--name=job", "--ioengine=nbd", "--uri=nbd+unix:///?socket=\(place)/n", "--rw=randrw", "--bs=4k", "--iodepth=16", "--size=8m",
      "--verify=crc32c", "--verify_fatal=1", "--output-format=json",
    ]
    let result = try RunningProgram("/usr/bin/fio", words, directory: place).wait(seconds: 120)
    #expect(result.code == 0, "\(result.output) \(result.errors)")
    // A line of the engine's comes before.
    let text = result.output.drop { $0 != "{" }
    let json = try JSONSerialization.jsonObject(with: Data(text.utf8)) as? [String: Any]
    let job = try #require((json?["jobs"] as? [[String: Any]])?.first)
    #expect(job["error"] as? Int == 0)
    for side in ["read", "write"] { #expect((job[side] as? [String: Any])?["total_ios"] as? Int ?? 0 > 100, "\(side)") }
    bridge.signal(SIGINT)
    #expect(bridge.wait().code == 0)
    let bytes = try Data(contentsOf: URL(fileURLWithPath: place + "/disk"))
    #expect(bytes.prefix(8 << 20).contains { $0 != 0 } && !bytes.dropFirst(8 << 20).contains { $0 != 0 })
  }
}

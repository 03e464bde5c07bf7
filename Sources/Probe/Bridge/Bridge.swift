import HostSystem

extension Verb {
  /// Other people's tools at a back end.
  package static let bridge = Verb(
    name: "bridge", summary: "serves a disk as NBD, or joins a network card to a tap or to capture files",
    notes: """
      A disk: --nbd PATH serves it on a Unix socket, fixed newstyle with structured replies, flush, FUA, trim and write-zeroes, to
      any number of connections: qemu-img, nbdinfo, nbdcopy and fio's nbd engine can then use the back end.

      A network card: the tool plays the guest. Frames from the card go to the tap and into the --pcap-out file; frames from the
      tap and from the --pcap-in file go to the card. With a tap, checksums and the cutting of large segments are left to card and
      tap as far as the card offers it. --pcap-out holds both directions. A pcap-in file ends the run, --linger
      after the last frame; otherwise Ctrl-C or --runtime does.
      """,
    options: [
      OptionRow("nbd", "PATH", "the socket to serve a disk on"),
      OptionRow("export", "NAME", "the export's name (default: none)"),
      OptionRow("read-only", nil, "let nobody write"),
      OptionRow("once", nil, "end when the last client has left"),
      OptionRow("tap", "NAME", "the tap interface to join a network card to"),
      OptionRow("no-offload", nil, "agree to no checksum and no segmentation offload with the card"),
      OptionRow("pcap-in", "PATH", "frames to send to a network card"),
      OptionRow("pcap-out", "PATH", "where to put all frames"),
      OptionRow("topspeed", nil, "send as fast as possible, not as captured"),
      OptionRow("linger", "SECONDS", "how long to wait for answers after the last frame (default 0.5)"),
      OptionRow("runtime", "SECONDS", "how long to join a network card (default: until Ctrl-C)"),
    ],
    run: { options throws(ProbeError) in try run(options) })

  private static func run(_ options: Options) throws(ProbeError) -> Outcome {
    let cardOptions = ["tap", "no-offload", "pcap-in", "pcap-out", "topspeed", "linger", "runtime"].filter { options.has($0) }
    let isDisk = options.has("nbd")
    if isDisk, let name = cardOptions.first { throw .badOption(name, why: "is for network cards, and --nbd is for disks") }
    if !isDisk, let name = ["export", "read-only", "once"].first(where: { options.has($0) }) {
      throw .badOption(name, why: "belongs to --nbd")
    }
    guard isDisk || options.has("tap") || options.has("pcap-in") || options.has("pcap-out") else {
      throw .noTarget("Nothing to join the back end to: give --nbd PATH for a disk; --tap NAME, --pcap-in or --pcap-out for a network card")
    }
    let interruption = try Interruption()
    let target: Target
    if let path = options.text("nbd") {
      guard path.utf8.count <= 107 else { throw .badOption("nbd", why: "is longer than the 107 bytes of a socket path") }
      let name = options.text("export") ?? ""
      guard name.utf8.count <= 4096 else { throw .badOption("export", why: "is longer than the 4096 bytes of a name") }
      target = try Target(options)
      defer { target.close() }
      try NBDServer(target, path: path, name: name, readOnly: options.has("read-only")).run(interruption, once: options.has("once"))
      return .passed
    }
    let limit = try options.duration("runtime", in: 0.01...86400)
    let linger = try options.duration("linger", in: 0...3600) ?? .milliseconds(500)
    var frames: [PcapFile.Frame]?
    if let path = options.text("pcap-in") {
      let bytes = try wrapping { () throws(SystemError) in try OwnedFD.open(path, 0).readToEnd(limit: 1 << 30) }
      frames = try PcapFile.read(bytes, name: path)
    }
    target = try Target(options)
    defer { target.close() }
    let bridge = try NetBridge(
      target, tap: options.text("tap"), capture: options.text("pcap-out"), mayOffload: !options.has("no-offload"))
    if options.has("tap") {
      let names = bridge.offloads.names(for: .net)
      Output.error("martlet probe: offloads agreed on: \(names.isEmpty ? "none" : names.joined(separator: " "))")
    }
    try bridge.run(interruption, frames: frames, pace: !options.has("topspeed"), limit: limit, linger: linger)
    Output.error(
      "martlet probe: \(bridge.sentCount) frames to the card, \(bridge.receivedCount) from it, \(bridge.droppedCount) dropped")
    return .passed
  }
}

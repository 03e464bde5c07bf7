import ControlProtocol
import HostSystem
import VirtioSpec

/// What to do with a network card.
package struct NetJob: Sendable {
  package enum Mode: String, Sendable, CaseIterable {
    /// Frames are sent and come back.
    case loop
    /// Frames are sent and end there.
    case send
    /// Frames come.
    case receive

    var sends: Bool { self != .receive }
    var receives: Bool { self != .send }
  }

  package var mode = Mode.loop
  /// Bytes of a frame from the destination address on, without a checksum at its end; one run for each.
  package var frameSizes: [Int] = [64]
  /// Frames on their way at most, in each queue pair.
  package var depth = 256
  var pairCount = 1
  var threadCount = 1
  var runtime = Duration.seconds(2)
  var ramp = Duration.milliseconds(200)
  package var rate: UInt64?
  var sleeps = false
  var pin: [Int] = []
  package var ringSize: UInt16 = 256
  var isPacked = false
  var hasEventIndex = true
  var isMergeable = false
  var destination = MACAddress("02:00:00:00:00:02") ?? MACAddress()
  /// The interface on whose other end the tool plays the network.
  var farEnd: String?
  var countsSystemCalls = true

  static let frameRange = 60...65000

  static let options: [OptionRow] = [
    OptionRow("mode", "MODE", "network cards: loop: frames come back; send: into a sink; receive: from a source (default loop)"),
    OptionRow("frame-size", "SIZES", "network cards: bytes of a frame, or several with commas (default 64)"),
    OptionRow("destination", "MAC", "network cards: where frames go (default 02:00:00:00:00:02)"),
    OptionRow("mergeable", nil, "network cards: with MRG_RXBUF"),
    OptionRow("far-end", "INTERFACE", "network cards: play the network at this interface: send back, take, or send (root)"),
  ]

  /// Options that make sense for a network card only, and for a disk only.
  static let ownNames = ["mode", "frame-size", "destination", "mergeable", "far-end"]
  static let diskNames = ["rw", "readwrite", "bs", "size", "offset", "rwmixread", "fsync", "randseed", "limit-file"]

  package init(_ options: Options) throws(ProbeError) {
    if let name = Self.diskNames.first(where: { options.has($0) }) {
      throw .badOption(name, why: "is for disks, and this is a network card")
    }
    mode = try options.choice("mode", Mode.allCases.map { ($0.rawValue, $0) }) ?? .loop
    if let text = options.text("frame-size") {
      frameSizes = []
      for word in text.split(separator: ",", omittingEmptySubsequences: false) {
        guard let size = Int(word), Self.frameRange.contains(size) else {
          throw .badOption(
            "frame-size", why: "wants sizes from \(Self.frameRange.lowerBound) to \(Self.frameRange.upperBound), not '\(text)'")
        }
        frameSizes.append(size)
      }
    }
    if let text = options.text("destination") {
      guard let address = MACAddress(text) else { throw .badOption("destination", why: "wants an address such as 02:00:00:00:00:02") }
      destination = address
    }
    depth = try options.number("iodepth", in: 1...32768) ?? depth
    for name in ["numjobs", "queues"] { pairCount = try options.number(name, in: 1...32) ?? pairCount }
    threadCount = min(pairCount, try options.number("threads", in: 1...32) ?? 1)
    runtime = try options.duration("runtime", in: 0.01...86400) ?? runtime
    ramp = try options.duration("ramp-time", in: 0...3600) ?? ramp
    rate = try options.number("rate-iops", in: 1...1_000_000_000).map { UInt64($0) }
    sleeps = try options.choice("wait", [("spin", false), ("sleep", true)]) ?? false
    pin = try options.processors("pin")
    try Processors.expect(pin, "pin")
    isPacked = options.has("packed")
    hasEventIndex = !options.has("no-event-idx")
    isMergeable = options.has("mergeable")
    farEnd = options.text("far-end")
    if let farEnd, farEnd.utf8.count > 15 { throw .badOption("far-end", why: "names no interface: '\(farEnd)' is too long") }
    countsSystemCalls = !options.has("no-syscalls")
    if let size = try options.number("ring-size", in: 2...32768) {
      guard isPacked || size & (size - 1) == 0 else { throw .badOption("ring-size", why: "wants a power of two, not \(size)") }
      guard size >= depth else { throw .badOption("ring-size", why: "is too small for \(depth) frames at once") }
      ringSize = UInt16(size)
    } else {
      while Int(ringSize) < depth { ringSize *= 2 }
    }
  }

  /// The load with one frame size in a line, for people.
  func summary(_ frameSize: Int) -> String {
    var text = "\(mode.rawValue), frames of \(frameSize) bytes, at most \(depth) on their way"
    if pairCount > 1 { text += ", \(pairCount) queue pairs" }
    if threadCount > 1 { text += ", \(threadCount) threads" }
    text += sleeps ? ", sleeping" : ", spinning"
    if isPacked { text += ", packed" }
    if isMergeable { text += ", mergeable" }
    if !hasEventIndex { text += ", no EVENT_IDX" }
    if let rate { text += ", at most \(rate)/s" }
    if let farEnd { text += ", far end at \(farEnd)" }
    if !pin.isEmpty { text += ", on processor \(pin.map(String.init).joined(separator: ","))" }
    return text
  }
}

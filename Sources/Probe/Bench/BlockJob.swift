import ControlProtocol
import HostSystem
import VirtioSpec

/// What to do with a disk, in fio's words.
package struct BlockJob: Sendable {
  package enum Pattern: String, Sendable, CaseIterable {
    case read, write, randread, randwrite, readwrite, rw, randrw, flush

    var isRandom: Bool { self == .randread || self == .randwrite || self == .randrw }
    var writes: Bool { self != .read && self != .randread && self != .flush }
  }

  package var pattern = Pattern.randread
  package var blockSize: UInt32 = 4096
  package var depth = 32
  var queueCount = 1
  var threadCount = 1
  /// Bytes used of the disk, from `offset` on; nil for all of it.
  var size: UInt64?
  var offset: UInt64 = 0
  var runtime = Duration.seconds(2)
  var ramp = Duration.milliseconds(200)
  /// Requests per second over all queues; nil for as many as possible.
  package var rate: UInt64?
  /// Percent of a mixed load that is read.
  var readShare = 50
  /// A flush after so many writes; 0 for none.
  var flushEvery = 0
  var sleeps = false
  var pin: [Int] = []
  var ringSize: UInt16?
  var isPacked = false
  var hasEventIndex = true
  var recordsInflight = false
  var seed: UInt64 = 1
  var countsSystemCalls = true

  static let options: [OptionRow] = [
    OptionRow("rw", "PATTERN", "read, write, randread, randwrite, rw, randrw or flush (default randread)"),
    OptionRow("readwrite", "PATTERN", "the same as --rw"),
    OptionRow("bs", "SIZE", "bytes of a request (default 4k)"),
    OptionRow("iodepth", "COUNT", "requests in flight in each queue (default 32), or frames (256)"),
    OptionRow("numjobs", "COUNT", "queues, or pairs of a network card (default 1)"),
    OptionRow("queues", "COUNT", "the same as --numjobs"),
    OptionRow("threads", "COUNT", "threads of the tool that share the queues (default 1)"),
    OptionRow("size", "SIZE", "working set (default: the whole disk)"),
    OptionRow("offset", "SIZE", "where the working set begins (default 0)"),
    OptionRow("runtime", "SECONDS", "how long to measure (default 2)"),
    OptionRow("ramp-time", "SECONDS", "how long to run before measuring (default 0.2)"),
    OptionRow("rate-iops", "COUNT", "most requests or frames a second, over all queues"),
    OptionRow("rwmixread", "PERCENT", "share of reads in rw and randrw (default 50)"),
    OptionRow("fsync", "COUNT", "flush after so many writes (default never)"),
    OptionRow("wait", "HOW", "spin: poll the ring; sleep: wait for calls (default spin)"),
    OptionRow("pin", "CPU[,CPU]", "processors for the tool's threads"),
    OptionRow("ring-size", "COUNT", "entries of a ring (default: fitting the depth, at least 128)"),
    OptionRow("packed", nil, "packed rings"),
    OptionRow("inflight", nil, "the back end records requests in flight, as for a front end that can replace it"),
    OptionRow("no-event-idx", nil, "without EVENT_IDX"),
    OptionRow("randseed", "NUMBER", "another sequence of random numbers"),
    OptionRow("no-syscalls", nil, "do not count system calls (needs a short extra run under ptrace)"),
  ]

  package init(_ options: Options) throws(ProbeError) {
    if let name = NetJob.ownNames.first(where: { options.has($0) }) {
      throw .badOption(name, why: "is for network cards, and this is a disk")
    }
    let patterns = Pattern.allCases.map { ($0.rawValue, $0) }
    for name in ["rw", "readwrite"] { if let pattern = try options.choice(name, patterns) { self.pattern = pattern } }
    if let size = try options.byteCount("bs", in: 512...16 << 20) {
      guard size % 512 == 0 else { throw .badOption("bs", why: "wants a multiple of 512 bytes, not \(size)") }
      blockSize = UInt32(size)
    }
    depth = try options.number("iodepth", in: 1...10922) ?? depth
    for name in ["numjobs", "queues"] { queueCount = try options.number(name, in: 1...64) ?? queueCount }
    threadCount = min(queueCount, try options.number("threads", in: 1...64) ?? 1)
    size = try options.byteCount("size", in: 512...1 << 62)
    offset = try options.byteCount("offset", in: 0...1 << 62) ?? 0
    guard offset % 512 == 0 else { throw .badOption("offset", why: "wants a multiple of 512 bytes, not \(offset)") }
    runtime = try options.duration("runtime", in: 0.01...86400) ?? runtime
    ramp = try options.duration("ramp-time", in: 0...3600) ?? ramp
    rate = try options.number("rate-iops", in: 1...1_000_000_000).map { UInt64($0) }
    readShare = try options.number("rwmixread", in: 0...100) ?? readShare
    flushEvery = try options.number("fsync", in: 0...1_000_000_000) ?? flushEvery
    sleeps = try options.choice("wait", [("spin", false), ("sleep", true)]) ?? false
    pin = try options.processors("pin")
    try Processors.expect(pin, "pin")
    isPacked = options.has("packed")
    hasEventIndex = !options.has("no-event-idx")
    recordsInflight = options.has("inflight")
    seed = UInt64(try options.number("randseed", in: 0...Int.max) ?? 1)
    countsSystemCalls = !options.has("no-syscalls")
    if let size = try options.number("ring-size", in: 4...32768) {
      guard isPacked || size & (size - 1) == 0 else { throw .badOption("ring-size", why: "wants a power of two, not \(size)") }
      guard size >= depth * 3 else {
        throw .badOption("ring-size", why: "is too small: \(depth) requests of 3 descriptors need \(depth * 3)")
      }
      ringSize = UInt16(size)
    }
  }

  /// Entries of a ring: three descriptors for each request, a power of two.
  var wantedRingSize: UInt16 {
    if let ringSize { return ringSize }
    var size = 128
    while size < depth * 3 { size *= 2 }
    return UInt16(min(size, 32768))
  }

  /// The load in a line, for people.
  var summary: String {
    var text = "\(pattern.rawValue), bs \(Quantity.describe(byteCount: UInt64(blockSize))), iodepth \(depth)"
    if queueCount > 1 { text += ", \(queueCount) queues" }
    if threadCount > 1 { text += ", \(threadCount) threads" }
    text += sleeps ? ", sleeping" : ", spinning"
    if isPacked { text += ", packed" }
    if recordsInflight { text += ", in flight recorded" }
    if !hasEventIndex { text += ", no EVENT_IDX" }
    if let rate { text += ", at most \(rate)/s" }
    if flushEvery > 0 { text += ", flush every \(flushEvery) writes" }
    if !pin.isEmpty { text += ", on processor \(pin.map(String.init).joined(separator: ","))" }
    return text
  }
}

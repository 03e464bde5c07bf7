import HostSystem
import Sandbox

@testable import Supervision

// What is written down of programs while they are watched, and what they tell of themselves.

let learnedCalls = Target(
  name: "learned-calls", about: "the calls of a watched program, as they become a profile",
  seeds: {
    // Two bytes of number, how many arguments differ from zero, and those.
    let mapping: [UInt8] = [9, 0, 2, 2, 0, 5, 3, 0, 2]
    let plain: [UInt8] = [0, 0, 0, 1, 0, 0, 60, 0, 0, 231, 0, 0]
    let new: [UInt8] = [0xD1, 1, 0, 0xFF, 0xFF, 0, 0xB3, 1, 0]
    let control: [UInt8] = [16, 0, 1, 1, 1, 0xD0, 0x54, 72, 0, 1, 1, 0, 3]
    return [plain, mapping, new, control, mapping + control + new + plain]
  },
  run: { script in
    var notes = CallNotes()
    var calls: [(number: UInt32, arguments: [UInt64])] = []
    while !script.isOver, calls.count < 64 {
      let number = script.u16()
      var arguments = [UInt64](repeating: 0, count: 6)
      for _ in 0..<script.byte() & 7 { arguments[script.below(6)] = script.number() }
      let call = (number: number == .max ? UInt32.max : UInt32(number), arguments: arguments)
      notes.add(call.number, call.arguments, isRoot: true)
      calls.append(call)
    }
    let profile: JailProfile
    do throws(JailError) { profile = try JailProfile(notes.lines.joined(separator: "\n"), file: "learned") } catch {
      return demand(false, "what was learned cannot be read: \(error)")
    }
    // In the jail it may do what it did, but for what is refused on purpose, and for signals to what was another process.
    let filter = SystemCallFilter(profile.calls, processID: 4711, refused: profile.refused)
    demand(filter.instructions.count <= 4096, "a filter of \(filter.instructions.count) instructions")
    for call in calls where SystemCall.number(SystemCall.name(call.number)) == call.number {
      if profile.refused.contains(where: { $0.number == call.number }) || SystemCall.name(call.number) == "tgkill" { continue }
      if SystemCall.name(call.number) == "clone", call.arguments[0] & 0x7E02_0000 != 0 { continue }
      let verdict = interpret(filter.instructions, call.number, call.arguments)
      demand(verdict == 0x7FFF_0000, "the profile does not allow what was seen: \(SystemCall.name(call.number)) \(call.arguments)")
    }
  })

let toldNumbers = Target(
  name: "told-numbers", about: "pages of counters, use of the host, and records of the kernel's log",
  seeds: {
    let record = "5,1,2,-;audit: type=1326 audit(1.1:2): auid=0 pid=4711 comm=\"blk0\" exe=\"/x\" sig=31 arch=c000003e syscall=257 compat=0"
    return [
      [0] + Array("cpu_ns=5 memory_rss=4096 threads=2 group_io_read=18446744073709551615".utf8), [1] + Array(record.utf8),
      [2, 0, 0xFF, 40, 1, 41, 7],
    ]
  }, words: ["cpu_ns=", "memory_rss=", " pid=4711", "type=1326 ", " syscall=", "="],
  run: { script in
    switch script.byte() % 3 {
    case 0:
      let text = String(decoding: script.rest(), as: UTF8.self)
      let usage = ProcessUsage(text)
      for key in ProcessUsage.Key.allCases {
        guard let value = usage[key] else { continue }
        demand(text.contains("\(key.rawValue)=") && text.utf8.count >= String(value).utf8.count, "\(key.rawValue) is made up: \(value)")
      }
    case 1:
      let text = String(decoding: script.rest(), as: UTF8.self)
      guard let number = KernelLog.call(text, 4711) else { return }
      demand(text.contains("pid=4711") && text.contains("type=1326") && text.contains("\(number)"), "a call is made up: \(number)")
    default:
      // Any page may be written at any time; what is read from it is a number, and the answer one that JSON can hold.
      let page = pageOfCounters
      for word in 0..<QueueStatistics.pageByteCount / 8 { page.store(0, at: word) }
      page.store(QueueStatistics.mark, at: 0)
      while !script.isOver {
        let word = 1 + Int(script.u16()) % (QueueStatistics.pageByteCount / 8 - 1)
        page.store(script.number(), at: word)
      }
      guard let copy = QueueStatisticsCopy(page.mapping, page: 0) else { return demand(false, "a page with its mark is not read") }
      demand(QueueStatisticsCopy(page.mapping, page: 1) == nil, "a page that is not there is read")
      for histogram in QueueStatistics.Histogram.allCases {
        var last: UInt64 = 0
        for percent in [0.0, 50, 99, 99.9, 100] {
          guard let value = copy.percentile(percent, histogram) else { continue }
          demand(value >= last, "a percentile falls from \(last) to \(value)")
          last = value
        }
      }
    }
  })

private struct Page: @unchecked Sendable {
  let mapping: MemoryMapping
  func store(_ value: UInt64, at word: Int) {
    UnsafeMutableRawPointer(mapping.baseAddress).storeBytes(of: value, toByteOffset: word * 8, as: UInt64.self)
  }
}
private let pageOfCounters = Page(mapping: sure { try MemoryMapping.anonymous(byteCount: QueueStatistics.pageByteCount) })

import ControlProtocol
import HostSystem

extension Verb {
  /// Whether data survives what happens to a back end.
  package static let verify = Verb(
    name: "verify", summary: "checked I/O on a disk while its back end is killed, stopped and cut off",
    notes: """
      The content of the disk's first --size bytes is lost. Killing and stopping need a back end started here (-- COMMAND).
      With INFLIGHT_SHMFD the promise is that every request is completed exactly once across ends of the back end; without,
      that completed writes stay, and requests whose end is not known are made again.
      """,
    options: [
      OptionRow("size", "SIZE", "bytes that are used, from the disk's beginning (default 16M)"),
      OptionRow("bs", "SIZE", "bytes of a block (default 4k)"),
      OptionRow("iodepth", "COUNT", "requests in flight (default 16)"),
      OptionRow("runtime", "SECONDS", "how long (default 10)"),
      OptionRow("every", "SECONDS", "how often something happens (default 1)"),
      OptionRow("trouble", "LIST", "kill, stop, cut: what may happen, commas between; or none (default all)"),
      OptionRow("inflight", "HOW", "auto or off (default auto)"),
      OptionRow("randseed", "NUMBER", "another sequence"),
      OptionRow("json", nil, "print JSON"),
    ],
    run: { options throws(ProbeError) in
      var plan = Verifier.Plan()
      plan.byteCount = try options.byteCount("size", in: 65536...1 << 40) ?? plan.byteCount
      plan.isExact = options.has("size")
      if let size = try options.byteCount("bs", in: 512...1 << 20) {
        guard size % 512 == 0 else { throw .badOption("bs", why: "wants a multiple of 512 bytes, not \(size)") }
        plan.blockSize = Int(size)
      }
      plan.depth = try options.number("iodepth", in: 1...40) ?? plan.depth
      plan.duration = try options.duration("runtime", in: 0.1...86400) ?? plan.duration
      plan.interval = try options.duration("every", in: 0.05...3600) ?? plan.interval
      plan.seed = UInt64(try options.number("randseed", in: 0...Int.max) ?? 1)
      plan.mayUseInflight = try options.choice("inflight", [("auto", true), ("off", false)]) ?? true
      if let text = options.text("trouble") {
        let words = text.split(separator: ",").map(String.init)
        if let wrong = words.first(where: { !["kill", "stop", "cut", "none"].contains($0) }) {
          throw .badOption("trouble", why: "does not know '\(wrong)'; it knows kill, stop, cut and none")
        }
        plan.kills = words.contains("kill")
        plan.stops = words.contains("stop")
        plan.cuts = words.contains("cut")
      }
      let target = try Target(options)
      let interruption = try Interruption()
      let result = try Verifier(target, plan).run { interruption.wait($0) }
      target.close()
      Output.write(options.has("json") ? result.json.text + "\n" : result.text)
      return result.findingCount == 0 ? .passed : .findings
    })
}

extension VerifyResult {
  private var kinds: [(String, [String])] {
    [
      ("lost or stale", lost), ("torn", torn), ("misplaced", misplaced), ("repeated", repeated), ("never completed", missing),
      ("failed", failed),
    ]
  }

  var promise: String {
    usesInflight
      ? "every request is completed exactly once, also across ends of the back end (inflight tracking)"
      : "completed writes stay; requests whose end is not known may have happened or not"
        + (isInflightOffered ? " (inflight tracking switched off)" : " (the back end offers no inflight tracking)")
  }

  var text: String {
    var text = "Promise        \(promise)\nRequests       \(writes) writes, \(reads) reads, \(flushes) flushes, all checked\n"
    text +=
      "Happened       \(kills) kills, \(stops) stops, \(cuts) cuts\nLongest gap    \(BenchReport.time(Double(longestGap.nanoseconds)))\n"
    for (name, list) in kinds where !list.isEmpty {
      text += "\(name): \(list.count)\n"
      for line in list.prefix(5) { text += "  \(line)\n" }
    }
    text += findingCount == 0 ? "Nothing lost, stale, torn, misplaced or repeated\n" : "\(findingCount) findings\n"
    return text + (wasInterrupted ? "Interrupted: these are the results so far.\n" : "")
  }

  var json: JSONValue {
    .record([
      "promise": .string(promise), "writes": .unsigned(UInt64(writes)), "reads": .unsigned(UInt64(reads)),
      "flushes": .unsigned(UInt64(flushes)),
      "kills": .unsigned(UInt64(kills)), "stops": .unsigned(UInt64(stops)), "cuts": .unsigned(UInt64(cuts)),
      "longest_gap_ns": .unsigned(UInt64(longestGap.nanoseconds)), "interrupted": .bool(wasInterrupted),
      "findings": .object(kinds.map { JSONValue.Member($0.0, .array($0.1.map { .string($0) })) }),
    ])
  }
}

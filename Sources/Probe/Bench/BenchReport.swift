import ControlProtocol

/// All results of one invocation, in words and in JSON.
struct BenchReport {
  let name: String
  /// The load in a line.
  let summary: String
  /// By back end, then by run.
  let results: [[BenchResult]]
  let limits: [LimitResult]
  let wasInterrupted: Bool

  static func median(_ values: [Double]) -> Double {
    guard !values.isEmpty else { return 0 }
    let sorted = values.sorted()
    let middle = sorted.count / 2
    return sorted.count % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
  }

  /// A rate with its unit.
  static func rate(_ value: Double) -> String {
    value >= 1e6 ? decimal(value / 1e6, 2) + " M/s" : value >= 1e3 ? decimal(value / 1e3, 1) + " k/s" : decimal(value, 1) + " /s"
  }

  static func bandwidth(_ value: Double) -> String {
    value >= 1_073_741_824 ? decimal(value / 1_073_741_824, 2) + " GiB/s" : decimal(value / 1_048_576, 1) + " MiB/s"
  }

  static func time(_ nanoseconds: Double) -> String {
    nanoseconds >= 1e9
      ? decimal(nanoseconds / 1e9, 2) + " s"
      : nanoseconds >= 1e6
        ? decimal(nanoseconds / 1e6, 2) + " ms"
        : nanoseconds >= 1e3 ? decimal(nanoseconds / 1e3, 2) + " µs" : decimal(nanoseconds, 0) + " ns"
  }

  // MARK: Words

  var text: String {
    var text = "\(name): \(summary)\n"
    let labels = results.count > 1 ? ["A", "B"] : [""]
    for (index, runs) in results.enumerated() {
      guard let run = middle(runs) else { continue }
      text += "\n" + (labels[index].isEmpty ? "" : labels[index] + "  ") + run.name + "\n"
      text += describe(run, runs)
    }
    if results.count > 1 { text += comparison }
    if !limits.isEmpty { text += limitText }
    if wasInterrupted { text += "\nInterrupted: these are the results so far.\n" }
    return text
  }

  /// The run with the middle rate stands for all of them.
  func middle(_ runs: [BenchResult]) -> BenchResult? {
    let sorted = runs.sorted { $0.requestsPerSecond < $1.requestsPerSecond }
    return sorted.isEmpty ? nil : sorted[sorted.count / 2]
  }

  private func describe(_ run: BenchResult, _ runs: [BenchResult]) -> String {
    let rates = runs.map(\.requestsPerSecond)
    var text =
      run.isNetwork
      ? "  frames        \(Self.rate(run.requestsPerSecond)), \(decimal(run.bytesPerSecond * 8 / 1e9, 2)) Gbit/s"
      : "  IOPS          \(Self.rate(run.requestsPerSecond)), bandwidth \(Self.bandwidth(run.bytesPerSecond))"
    if runs.count > 1 {
      text += " (middle of \(runs.count) runs, \(Self.rate(rates.min() ?? 0)) to \(Self.rate(rates.max() ?? 0)))"
    }
    text += "\n"
    if run.counts.errors > 0 {
      text += "  errors        \(run.counts.errors) of \(run.requests) \(run.isNetwork ? "frames" : "requests")\n"
    }
    if run.counts.lost > 0 { text += "  lost          \(run.counts.lost) of \(run.counts.writes) frames did not come back within 50 ms\n" }
    let labels = run.isNetwork ? ["round trip", ""] : ["read lat", run.counts.writes > 0 ? "write lat" : "flush lat"]
    for (label, summary) in zip(labels, [run.reads, run.writes]) where summary.count > 0 {
      text += "  " + label.padded(to: 14)
      text +=
        "min \(Self.time(Double(summary.least))), avg \(Self.time(summary.mean)), max \(Self.time(Double(summary.greatest))), stdev \(Self.time(summary.deviation))\n"
      text +=
        "                "
        + [50, 90, 99, 99.9, 99.99].map {
          "p\(decimal($0, $0 == 50 || $0 == 90 || $0 == 99 ? 0 : $0 == 99.9 ? 1 : 2)) \(Self.time(Double(summary.percentile($0))))"
        }
        .joined(separator: ", ") + "\n"
    }
    let cpu = run.backEndCPU.map { "back end \(Self.time(run.perRequest($0)))" } ?? "back end not visible"
    text += "  CPU/\(run.isNetwork ? "frame  " : "request")   \(cpu), tool \(Self.time(run.perRequest(run.toolCPU)))"
    if let waiting = run.waitingShare { text += " (it waited \(decimal(100 * waiting, 0)) % of the time)" }
    text += "\n"
    text +=
      "  per \(run.isNetwork ? "frame  " : "request")   \(decimal(run.perRequest(run.counts.kicks), 3)) kicks, \(decimal(run.perRequest(run.counts.calls), 3)) calls, system calls: back end "
    text += run.backEndSystemCalls.map { decimal($0, 3) + " (counted apart, under ptrace)" } ?? "not counted"
    text += ", tool \(decimal(run.perRequest(run.counts.systemCalls), 3))\n"
    return text
  }

  /// Ratios A/B of runs that were neighbours in time.
  var ratios: [Double] {
    guard results.count > 1 else { return [] }
    return zip(results[0], results[1]).compactMap { a, b in
      b.requestsPerSecond > 0 ? a.requestsPerSecond / b.requestsPerSecond : nil
    }
  }

  private var comparison: String {
    let ratios = self.ratios
    guard !ratios.isEmpty else { return "" }
    var text = "\nA / B           \(decimal(Self.median(ratios), 3)) in requests per second"
    text += " (median of \(ratios.count) pairs, \(decimal(ratios.min() ?? 0, 3)) to \(decimal(ratios.max() ?? 0, 3)))\n"
    let best = (results[0].map(\.requestsPerSecond).max() ?? 0) / max(1e-9, results[1].map(\.requestsPerSecond).max() ?? 0)
    text += "                \(decimal(best, 3)) of the best runs\n"
    let costs = zip(results[0], results[1]).compactMap { a, b -> Double? in
      guard let first = a.backEndCPU, let second = b.backEndCPU, b.perRequest(second) > 0 else { return nil }
      return a.perRequest(first) / b.perRequest(second)
    }
    if !costs.isEmpty {
      text +=
        "                \(decimal(Self.median(costs), 3)) in CPU per request (\(decimal(costs.min() ?? 0, 3)) to \(decimal(costs.max() ?? 0, 3)))\n"
    }
    return text
  }

  private var limitText: String {
    var text = "\nLimits of the machine, in the same rounds (medians)\n"
    let rate = middle(results[0])?.requestsPerSecond ?? 0
    func line(_ label: String, _ values: [Double], _ unit: String) -> String {
      guard !values.isEmpty else { return "" }
      let middle = Self.median(values)
      return "  " + label.padded(to: 26)
        + "\(Self.rate(middle)), \(Self.time(1e9 / max(middle, 1e-9))) each; \(unit) \(decimal(rate / max(middle, 1e-9), 3)) of it\n"
    }
    text += line("bare io_uring, same file", limits.compactMap(\.ringRequestsPerSecond), "the back end reaches")
    if let problem = limits.compactMap(\.ringProblem).first { text += "  bare io_uring: \(problem)\n" }
    text += line("copy of one block", limits.compactMap(\.copiesPerSecond), "the back end reaches")
    text += line("eventfd round trip", limits.compactMap(\.eventRoundTripsPerSecond), "the back end reaches")
    return text
  }

  // MARK: JSON

  func json(withBuckets: Bool) -> JSONValue { .object(Self.head(jobs: jobs(withBuckets)) + rest) }

  static func head(jobs: [JSONValue]) -> [JSONValue.Member] {
    [JSONValue.Member("fio version", .string("martlet-probe")), JSONValue.Member("jobs", .array(jobs))]
  }

  /// Every run as one of fio's jobs.
  func jobs(_ withBuckets: Bool) -> [JSONValue] {
    results.enumerated().flatMap { index, runs in
      runs.map { Self.job($0, name: results.count > 1 ? "\(name)-\(["A", "B"][index])" : name, withBuckets) }
    }
  }

  /// What stands beside the jobs.
  var rest: [JSONValue.Member] {
    var members: [JSONValue.Member] = []
    if !ratios.isEmpty {
      members.append(
        JSONValue.Member(
          "comparison",
          .record([
            "ratio_median": .number(Self.median(ratios)), "ratio_min": .number(ratios.min() ?? 0),
            "ratio_max": .number(ratios.max() ?? 0), "pairs": .unsigned(UInt64(ratios.count)),
          ])))
    }
    if !limits.isEmpty {
      members.append(
        JSONValue.Member(
          "limits",
          .array(
            limits.map { limit in
              .record([
                "io_uring_iops": limit.ringRequestsPerSecond.map { .number($0) } ?? .null,
                "copies_per_s": limit.copiesPerSecond.map { .number($0) } ?? .null,
                "eventfd_round_trips_per_s": limit.eventRoundTripsPerSecond.map { .number($0) } ?? .null,
              ])
            })))
    }
    members.append(JSONValue.Member("interrupted", .bool(wasInterrupted)))
    return members
  }

  private static func job(_ run: BenchResult, name: String, _ withBuckets: Bool) -> JSONValue {
    func side(_ count: UInt64, _ summary: LatencySummary, isData: Bool) -> JSONValue {
      let bytes = isData ? count * run.byteCount : 0
      let perSecond = run.seconds > 0 ? Double(bytes) / run.seconds : 0
      // Slices are of all requests; a direction has its share of them.
      let share = run.requests > 0 ? Double(count) / Double(run.requests) : 0
      let slices = run.rates.map { $0 * share }
      let block = isData ? Double(run.byteCount) / 1024 : 0
      let members: KeyValuePairs<String, JSONValue> = [
        "io_bytes": .unsigned(bytes), "io_kbytes": .unsigned(bytes / 1024), "bw_bytes": .unsigned(UInt64(perSecond)),
        "bw": .unsigned(UInt64(perSecond / 1024)), "iops": .number(run.seconds > 0 ? Double(count) / run.seconds : 0),
        "runtime": .unsigned(UInt64(run.seconds * 1000)), "total_ios": .unsigned(count),
        "short_ios": .unsigned(0), "drop_ios": .unsigned(0),
        "slat_ns": latency(LatencySummary(), false, false), "clat_ns": latency(summary, true, withBuckets),
        "lat_ns": latency(summary, false, withBuckets),
      ]
      return .object(
        members.map { JSONValue.Member($0.key, $0.value) } + spread("bw", slices.map { $0 * block }) + spread("iops", slices))
    }
    let usage = { (time: UInt64?) -> JSONValue in time.map { .number(Double($0) / 1e7 / max(run.seconds, 1e-9)) } ?? .null }
    return .record([
      "jobname": .string(name), "groupid": .unsigned(0), "job_runtime": .unsigned(UInt64(run.seconds * 1000)),
      "error": .unsigned(run.counts.errors > 0 ? 5 : 0), "total_err": .unsigned(run.counts.errors),
      "job options": .object(run.options.map { JSONValue.Member($0.name, .string($0.value)) }),
      "read": side(run.counts.reads, run.reads, isData: true),
      "write": side(run.counts.writes, run.counts.writes > 0 && !run.isNetwork ? run.writes : LatencySummary(), isData: true),
      "sync": .record([
        "total_ios": .unsigned(run.counts.flushes),
        "lat_ns": latency(run.counts.writes == 0 ? run.writes : LatencySummary(), true, withBuckets),
      ]),
      "martlet": .record([
        "back_end": .string(run.name), "requests_per_s": .number(run.requestsPerSecond),
        "gbit_per_s": .number(run.bytesPerSecond * 8 / 1e9), "lost": .unsigned(run.counts.lost),
        "back_end_cpu_percent": usage(run.backEndCPU), "tool_cpu_percent": usage(run.toolCPU),
        "back_end_cpu_ns_per_request": run.backEndCPU.map { .number(run.perRequest($0)) } ?? .null,
        "tool_cpu_ns_per_request": .number(run.perRequest(run.toolCPU)),
        "tool_waiting_percent": run.waitingShare.map { .number(100 * $0) } ?? .null,
        "back_end_system_calls_per_request": run.backEndSystemCalls.map { .number($0) } ?? .null,
        "tool_system_calls_per_request": .number(run.perRequest(run.counts.systemCalls)),
        "kicks_per_request": .number(run.perRequest(run.counts.kicks)), "calls_per_request": .number(run.perRequest(run.counts.calls)),
        "iops_over_time": .array(run.rates.map { .number($0) }),
        "slice_ms": .unsigned(UInt64(run.slice.nanoseconds / 1_000_000)),
      ]),
    ])
  }

  /// What fio tells of samples over time.
  private static func spread(_ name: String, _ samples: [Double]) -> [JSONValue.Member] {
    let mean = samples.reduce(0, +) / Double(max(1, samples.count))
    let squares = samples.reduce(0) { $0 + ($1 - mean) * ($1 - mean) }
    return [
      JSONValue.Member("\(name)_min", .unsigned(UInt64(max(0, samples.min() ?? 0)))),
      JSONValue.Member("\(name)_max", .unsigned(UInt64(max(0, samples.max() ?? 0)))),
      JSONValue.Member("\(name)_mean", .number(mean)),
      JSONValue.Member("\(name)_stddev", .number(samples.count > 1 ? (squares / Double(samples.count - 1)).squareRoot() : 0)),
      JSONValue.Member("\(name)_samples", .unsigned(UInt64(samples.count))),
    ]
  }

  private static func latency(_ summary: LatencySummary, _ withPercentiles: Bool, _ withBuckets: Bool) -> JSONValue {
    var members: [JSONValue.Member] = [
      JSONValue.Member("min", .unsigned(summary.least)), JSONValue.Member("max", .unsigned(summary.greatest)),
      JSONValue.Member("mean", .number(summary.mean)), JSONValue.Member("stddev", .number(summary.deviation)),
      JSONValue.Member("N", .unsigned(summary.count)),
    ]
    if withPercentiles, summary.count > 0 {
      members.append(
        JSONValue.Member(
          "percentile",
          .object(LatencySummary.percentages.map { JSONValue.Member(decimal($0, 6), .unsigned(summary.percentile($0))) })))
    }
    if withPercentiles, withBuckets {
      members.append(
        JSONValue.Member("bins", .object(summary.buckets.map { JSONValue.Member("\($0.start)", .unsigned($0.count)) })))
    }
    return .object(members)
  }
}

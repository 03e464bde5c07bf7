import ControlProtocol
import Glibc
import HostSystem
import VirtioSpec

extension Verb {
  /// How fast a back end is, and what that costs.
  package static let bench = Verb(
    name: "bench", summary: "rate, latency and cost of a disk, with fio's option names",
    notes: """
      --vs runs both back ends in turn, A B B A, --rounds times over, and prints the ratio of each pair with its spread.
      --limit adds what the machine itself can do in the same rounds: eventfd round trips, copies of one block, and with
      --limit-file an io_uring on that file with the same pattern, block size and depth.
      """,
    options: BlockJob.options + [
      OptionRow("vs", "'COMMAND'", "a second back end to compare with"),
      OptionRow("rounds", "COUNT", "rounds of A B B A (default 3; without --vs and --limit: 1 run)"),
      OptionRow("limit", nil, "measure the machine's own limits in the same rounds"),
      OptionRow("limit-file", "PATH", "the file for the io_uring limit (implies --limit)"),
      OptionRow("output-format", "FORMAT", "normal, json (fio's shape) or json+ (with latency buckets)"),
      OptionRow("output", "PATH", "write the result to a file"),
      OptionRow("name", "TEXT", "the job's name in the output"),
      OptionRow("html", "PATH", "also write one page with plots"),
    ],
    run: { options throws(ProbeError) in try BenchSession(options).run() })
}

/// All runs of one invocation.
final class BenchSession {
  private let options: Options
  private let job: BlockJob
  private let interruption: Interruption
  private let rate: CycleRate
  /// The back ends, the one under test first.
  private let targets: [Target]
  private let rounds: Int
  private let measuresLimits: Bool
  private var results: [[BlockResult]]
  private var limits: [LimitResult] = []

  init(_ options: Options) throws(ProbeError) {
    self.options = options
    let job = try BlockJob(options)
    self.job = job
    interruption = try Interruption()
    var targets = [try Target(options)]
    if let text = options.text("vs") {
      guard let words = Words.split(text), !words.isEmpty else { throw .badOption("vs", why: "has a quote that is not closed") }
      targets.append(try Target(options.with(command: words)))
    }
    self.targets = targets
    measuresLimits = options.has("limit") || options.has("limit-file")
    let isCompared = targets.count > 1 || measuresLimits
    rounds = try options.number("rounds", in: 1...1000) ?? (isCompared ? 3 : 1)
    results = targets.map { _ in [] }
    rate = CycleRate.measured()
  }

  func run() throws(ProbeError) -> Outcome {
    defer { for target in targets { target.close() } }
    let format = try options.choice("output-format", [("normal", 0), ("json", 1), ("json+", 2)]) ?? 0
    rounds: for round in 0..<rounds {
      if measuresLimits {
        limits.append(LimitResult.measure(job, file: options.text("limit-file"), rate))
        if interruption.isRequested { break }
      }
      for index in targets.count == 1 ? [0] : [0, 1, 1, 0] {
        results[index].append(try measure(index, round))
        if interruption.happened { break rounds }
      }
    }
    if job.countsSystemCalls, !interruption.happened {
      for (index, target) in targets.enumerated() where !results[index].isEmpty {
        let calls = countSystemCalls(target)
        for run in results[index].indices { results[index][run].backEndSystemCalls = calls }
      }
    }
    let report = BenchReport(
      name: options.text("name") ?? "probe", job: job, results: results, limits: limits, wasInterrupted: interruption.happened)
    let text = format == 0 ? report.text : report.json(withBuckets: format == 2).text + "\n"
    if let path = options.text("output") { try Output.save(Array(text.utf8), to: path) } else { Output.write(text) }
    if let path = options.text("html") { try Output.save(Array(report.html.utf8), to: path) }
    return results.joined().contains { $0.counts.errors > 0 } ? .findings : .passed
  }

  private func measure(_ index: Int, _ round: Int) throws(ProbeError) -> BlockResult {
    let run = try BlockRun(targets[index], job, rate)
    let title = targets.count == 1 ? "bench" : "round \(round + 1)/\(rounds), \(index == 0 ? "A" : "B")"
    let result = try run.measure(interruption, title: title)
    run.finish()
    return result
  }

  /// A short run under ptrace; nil where that cannot be done.
  private func countSystemCalls(_ target: Target) -> Double? {
    var short = job
    short.runtime = .milliseconds(300)
    short.ramp = .milliseconds(50)
    do throws(ProbeError) {
      let run = try BlockRun(target, short, rate)
      guard let process = target.processID, process != getpid() else { return nil }
      let counter = SystemCallCounter(process: process)
      guard let thread = counter.start() else { return nil }
      defer {
        counter.stop()
        thread.join()
      }
      let result = try run.measure(interruption, title: "counting system calls", counter: counter)
      run.finish()
      guard result.completedWhenCounted > 0 else { return nil }
      return Double(result.systemCallsCounted) / Double(result.completedWhenCounted)
    } catch {
      return nil
    }
  }
}

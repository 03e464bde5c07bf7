import ControlProtocol
import Glibc
import HostSystem
import VirtioSpec

extension Verb {
  /// How fast a back end is, and what that costs.
  package static let bench = Verb(
    name: "bench", summary: "rate, latency and cost of a disk or a network card, with fio's option names",
    notes: """
      --vs runs both back ends in turn, A B B A, --rounds times over, and prints the ratio of each pair with its spread.
      --limit adds what the machine itself can do in the same rounds: eventfd round trips, copies of one block, and with
      --limit-file an io_uring on that file with the same pattern, block size and depth.

      A network card is sent frames and takes them back (loop: its other side must return them), is only sent to (send), or
      is only heard (receive). With --far-end the tool itself is that other side, at the interface behind the back end.
      """,
    options: BlockJob.options + NetJob.options + [
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

/// What a back end is put to.
enum BenchLoad: Sendable {
  case disk(BlockJob)
  case network(NetJob, frameSize: Int)

  var summary: String {
    switch self {
    case .disk(let job): job.summary
    case .network(let job, let frameSize): job.summary(frameSize)
    }
  }

  var countsSystemCalls: Bool {
    switch self {
    case .disk(let job): job.countsSystemCalls
    case .network(let job, _): job.countsSystemCalls
    }
  }

  /// The same for a moment.
  var short: BenchLoad {
    switch self {
    case .disk(var job):
      job.runtime = .milliseconds(300)
      job.ramp = .milliseconds(50)
      return .disk(job)
    case .network(var job, let frameSize):
      job.runtime = .milliseconds(300)
      job.ramp = .milliseconds(50)
      return .network(job, frameSize: frameSize)
    }
  }

  func prepare(_ target: Target, _ rate: CycleRate) throws(ProbeError) -> any BenchRun {
    switch self {
    case .disk(let job): try BlockRun(target, job, rate)
    case .network(let job, let frameSize): try NetRun(target, job, frameSize: frameSize, rate)
    }
  }

  func limits(file: String?) -> LimitResult {
    switch self {
    case .disk(let job): LimitResult.measure(blockSize: Int(job.blockSize), job, file: file)
    case .network(_, let frameSize): LimitResult.measure(blockSize: frameSize, nil, file: nil)
    }
  }
}

/// All runs of one invocation.
final class BenchSession {
  private let options: Options
  private let interruption: Interruption
  private let rate: CycleRate
  /// The back ends, the one under test first.
  private let targets: [Target]
  private let loads: [BenchLoad]
  private let rounds: Int
  private let measuresLimits: Bool

  init(_ options: Options) throws(ProbeError) {
    self.options = options
    // What is wrong with the options is told before anything is started.
    let disk = Result { () throws(ProbeError) in try BlockJob(options) }
    let network = Result { () throws(ProbeError) in try NetJob(options) }
    if case .failure(let error) = disk, case .failure = network { throw error }
    for name in ["output", "html"] { try Output.expect(options.text(name)) }
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
    rate = CycleRate.measured()
    if try Self.isNetworkCard(options, targets[0]) {
      let job = try network.get()
      loads = job.frameSizes.map { .network(job, frameSize: $0) }
    } else {
      let job = try disk.get()
      if let path = options.text("limit-file") { try LimitResult.expect(path, blockSize: Int(job.blockSize)) }
      loads = [.disk(job)]
    }
  }

  /// By what was asked for, or else by asking the back end.
  private static func isNetworkCard(_ options: Options, _ target: Target) throws(ProbeError) -> Bool {
    if options.has("type") {
      switch try DeviceGuess.device(options, Offer()).device {
      case .net?: return true
      case .block?: return false
      default: throw .badOption("type", why: "names a device that bench does not know; it knows blk and net")
      }
    }
    if NetJob.ownNames.contains(where: { options.has($0) }) { return true }
    if NetJob.diskNames.contains(where: { options.has($0) }) || !target.canReconnect { return false }
    var link = try Link(target)
    do throws(ProbeError) { try link.negotiate(configurationByteCount: 60) } catch { return false }
    return DeviceGuess.guess(link.offer).device == .net
  }

  func run() throws(ProbeError) -> Outcome {
    defer { for target in targets { target.close() } }
    let format = try options.choice("output-format", [("normal", 0), ("json", 1), ("json+", 2)]) ?? 0
    var reports: [BenchReport] = []
    for load in loads where !interruption.happened { reports.append(try measure(load)) }
    let text: String
    if format == 0 {
      text = reports.map(\.text).joined(separator: "\n")
    } else if reports.count == 1 {
      text = reports[0].json(withBuckets: format == 2).text + "\n"
    } else {
      let jobs = reports.flatMap { $0.jobs(format == 2) }
      let each = JSONValue.Member("reports", .array(reports.map { .object($0.rest) }))
      text = JSONValue.object(BenchReport.head(jobs: jobs) + [each]).text + "\n"
    }
    if let path = options.text("output") { try Output.save(Array(text.utf8), to: path) } else { Output.write(text) }
    if let path = options.text("html") { try Output.save(Array(BenchReport.page(reports).utf8), to: path) }
    return reports.contains { $0.results.joined().contains { $0.counts.errors > 0 } } ? .findings : .passed
  }

  private func measure(_ load: BenchLoad) throws(ProbeError) -> BenchReport {
    var results: [[BenchResult]] = targets.map { _ in [] }
    var limits: [LimitResult] = []
    rounds: for round in 0..<rounds {
      if measuresLimits {
        limits.append(load.limits(file: options.text("limit-file")))
        if interruption.isRequested { break }
      }
      for index in targets.count == 1 ? [0] : [0, 1, 1, 0] {
        results[index].append(try measure(load, index, round))
        if interruption.happened { break rounds }
      }
    }
    if load.countsSystemCalls, !interruption.happened {
      for (index, target) in targets.enumerated() where !results[index].isEmpty {
        let calls = countSystemCalls(load.short, target)
        for run in results[index].indices { results[index][run].backEndSystemCalls = calls }
      }
    }
    return BenchReport(
      name: options.text("name") ?? "probe", summary: load.summary, results: results, limits: limits,
      wasInterrupted: interruption.happened)
  }

  private func measure(_ load: BenchLoad, _ index: Int, _ round: Int) throws(ProbeError) -> BenchResult {
    let run = try load.prepare(targets[index], rate)
    let title = targets.count == 1 ? "bench" : "round \(round + 1)/\(rounds), \(index == 0 ? "A" : "B")"
    let result = try run.measure(interruption, title: title, counter: nil)
    run.finish()
    return result
  }

  /// A short run under ptrace; nil where that cannot be done.
  private func countSystemCalls(_ load: BenchLoad, _ target: Target) -> Double? {
    do throws(ProbeError) {
      let run = try load.prepare(target, rate)
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

import Probe
import TestSupport
import Testing

private func parse(_ words: [String]) throws -> Options {
  try Options.parse(words, verb: .bench)
}

@Suite struct OptionsTests {
  @Test func namesMayBeWrittenAsFioWritesThem() throws {
    let job = try BlockJob(try parse(["--rw=randrw", "--rate_iops", "500", "--bs", "64k", "--iodepth=8", "--socket", "/x"]))
    #expect(job.pattern == .randrw)
    #expect(job.rate == 500)
    #expect(job.blockSize == 65536)
    #expect(job.depth == 8)
  }

  @Test(arguments: [
    ["--bs", "1000"], ["--iodepth", "0"], ["--runtime", "-1"], ["--rw", "randraed"], ["--ring-size", "100"], ["--pin", "a"],
  ])
  func impossibleValuesAreRefused(words: [String]) throws {
    let options = try parse(words)
    #expect(throws: ProbeError.self) { try BlockJob(options) }
  }

  @Test func aMistypedNameIsAnsweredWithTheNearest() {
    do {
      _ = try parse(["--iodeph", "3"])
      Issue.record("accepted")
    } catch {
      #expect("\(error)".contains("--iodepth"))
    }
  }

  @Test func everythingAfterTwoDashesIsTheCommand() throws {
    let options = try parse(["--rw", "read", "--", "prog", "--rw", "write"])
    #expect(options.command == ["prog", "--rw", "write"])
    #expect(options.text("rw") == "read")
  }

  @Test func commandLinesAreSplitAsAShellWould() {
    #expect(Words.split("a 'b c' \"d e\"f g\\ h") == ["a", "b c", "d ef", "g h"])
    #expect(Words.split("a 'b") == nil)
  }
}

@Suite("How long a spinning lane leaves the ring alone")
struct BatchPaceTests {
  /// A cycle is a nanosecond. How long after it took `count` requests that took `each` it stays away, after many such turns.
  private func pause(depth: Int, taking count: Int, each: UInt64) -> UInt64 {
    var pace = BatchPace(depth: depth, CycleRate(cyclesPerSecond: 1e9))
    var now: UInt64 = 1 << 40
    for _ in 0..<100 {
      now += UInt64(count) * each
      pace.took(count, now)
    }
    return (0..<10_000).first { !pace.isEarly(now + $0) } ?? .max
  }

  @Test func longerTheMoreThereIsToBatchAndNeverPastItsBound() {
    #expect((1400...1600).contains(pause(depth: 32, taking: 4, each: 100)))
    #expect((3000...3200).contains(pause(depth: 32, taking: 12, each: 200)))
    #expect(pause(depth: 256, taking: 64, each: 200) == 4000)
  }

  @Test func notAtAllWithFewInFlightOrASlowBackEnd() {
    #expect(pause(depth: 7, taking: 1, each: 100) == 0)
    #expect(pause(depth: 1, taking: 1, each: 50) == 0)
    #expect(pause(depth: 32, taking: 4, each: 700) == 0)
    #expect(pause(depth: 128, taking: 1, each: 1_000_000_000) == 0)
  }
}

@Suite struct LatencyHistogramTests {
  @Test func bucketsFollowOneAnotherWithoutGap() {
    for bucket in 0..<(LatencyHistogram.bucketCount - 1) {
      let start = LatencyHistogram.start(bucket)
      let next = LatencyHistogram.start(bucket + 1)
      #expect(start < next)
      #expect(LatencyHistogram.bucket(start) == bucket)
      #expect(LatencyHistogram.bucket(next - 1) == bucket)
    }
  }

  @Test func percentilesAreThoseOfTheValuesWithinThreePercent() {
    var histogram = LatencyHistogram()
    for value in 1...100_000 { histogram.record(UInt64(value)) }
    let summary = histogram.summary
    check(summary.count == 100_000)
    for percent in [1.0, 50, 90, 99, 99.9] {
      let exact = percent * 1000
      let found = Double(summary.percentile(percent))
      check(found >= exact * 0.97 && found <= exact * 1.04, "\(percent) % is \(found)")
    }
    check(summary.greatest == 100_000)
    check(abs(summary.mean - 50_000.5) < 0.01)
    check(abs(summary.deviation - 28_867.5) < 1)
  }
}

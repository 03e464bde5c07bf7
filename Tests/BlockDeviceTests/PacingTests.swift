import BlockDevice
import HostSystem
import Testing

@Suite struct PollBudgetTests {
  @Test func shortSleepsMakeItLookAndLongOnesMakeItStop() {
    var budget = PollBudget(.auto)
    #expect(budget.nanoseconds == 0)
    var time: UInt64 = 1_000_000_000
    for _ in 0..<8 {
      budget.slept(from: time, to: time + 10_000)
      time += 20_000
      if budget.nanoseconds == PollBudget.longest { budget.succeeded() }
      if budget.nanoseconds == PollBudget.longest { break }
    }
    #expect(budget.nanoseconds == PollBudget.longest)
    for _ in 0..<5 { budget.slept(from: time, to: time + 1_000_000) }
    #expect(budget.nanoseconds == 0)
  }

  @Test func losingTheProcessorStopsItForLongerEachTime() {
    var budget = PollBudget(.auto)
    var time: UInt64 = 1_000_000_000
    func sleepShortly(_ count: Int) {
      for _ in 0..<count {
        budget.slept(from: time, to: time + 5_000)
        time += 10_000
      }
    }
    sleepShortly(1)
    #expect(budget.nanoseconds > 0)
    budget.lostProcessor(now: time)
    sleepShortly(50)
    #expect(budget.nanoseconds == 0, "half a millisecond later it still rests")
    time += 1_000_000
    sleepShortly(1)
    #expect(budget.nanoseconds > 0)
    budget.lostProcessor(now: time)
    time += 1_500_000
    sleepShortly(1)
    #expect(budget.nanoseconds == 0, "the second rest is longer")
  }

  @Test func looksInVainWithShortSleepsBehindThemEnd() {
    var budget = PollBudget(.auto)
    var time: UInt64 = 1_000_000_000
    var greatest: UInt64 = 0
    for _ in 0..<20 {
      budget.slept(from: time, to: time + 5_000)
      time += 10_000
      greatest = max(greatest, budget.nanoseconds)
    }
    #expect(greatest == PollBudget.longest)
    #expect(budget.nanoseconds == 0)
  }

  @Test func whoIsAloneOffersItsProcessorLessAndLess() {
    var budget = PollBudget(.auto)
    let first = budget.patience
    budget.yieldedInVain()
    #expect(budget.patience == first, "One time says nothing")
    for _ in 0..<1000 { budget.yieldedInVain() }
    #expect(budget.patience >= PollBudget.longest)
    budget.lostProcessor(now: 1_000_000_000)
    #expect(budget.patience == first, "Somebody wants it after all")
  }

  @Test func aFixedLengthStays() {
    var budget = PollBudget(.fixed(50))
    budget.slept(from: 0, to: 1_000_000_000)
    budget.lostProcessor(now: 1_000_000_000)
    #expect(budget.nanoseconds == 50_000)
    #expect(PollPolicy("0") == nil && PollPolicy("x") == nil && PollPolicy("off") == .off && PollPolicy("7") == .fixed(7))
  }
}

@Suite struct RateLimiterTests {
  /// How many requests of `byteCount` pass within `seconds`, by a clock of the test's own.
  private func passed(_ limiter: RateLimiter, byteCount: UInt64, seconds: Double) -> Int {
    var now: UInt64 = 5_000_000_000
    let end = now + UInt64(seconds * 1e9)
    var count = 0
    while now < end {
      let wait = limiter.wait(at: now)
      if wait > 0 {
        now += wait
        continue
      }
      while limiter.isOpen {
        limiter.took(byteCount: byteCount)
        count += 1
      }
    }
    return count
  }

  @Test(arguments: [(100, 1000), (20_000, 1000), (1_000_000, 100)])
  func operationsAreLimited(size: Int, milliseconds: Int) throws {
    let start = MonotonicTime(nanoseconds: 5_000_000_000)
    let bucket = RateBucket(size: UInt64(size), refillTime: .milliseconds(milliseconds))
    let limiter = try #require(RateLimiter(bytes: nil, operations: bucket, now: start))
    let wanted = Double(size) * 10 / (Double(milliseconds) / 1000) + Double(size)
    let count = Double(passed(limiter, byteCount: 4096, seconds: 10))
    #expect(abs(count - wanted) / wanted < 0.02)
  }

  @Test(arguments: [UInt64(512), 4096, 1 << 20])
  func bytesAreLimitedWhateverTheSizeOfRequests(byteCount: UInt64) throws {
    let start = MonotonicTime(nanoseconds: 5_000_000_000)
    let bucket = RateBucket(size: 10 << 20, refillTime: .milliseconds(1000))
    let limiter = try #require(RateLimiter(bytes: bucket, operations: nil, now: start))
    let wanted = Double(11 * (10 << 20))
    let bytes = Double(passed(limiter, byteCount: byteCount, seconds: 10)) * Double(byteCount)
    #expect(abs(bytes - wanted) / wanted < 0.02)
  }

  @Test func theBurstComesOnce() throws {
    let start = MonotonicTime(nanoseconds: 5_000_000_000)
    let bucket = RateBucket(size: 100, oneTimeBurst: 1000, refillTime: .milliseconds(1000))
    let limiter = try #require(RateLimiter(bytes: nil, operations: bucket, now: start))
    #expect((1095...1110).contains(passed(limiter, byteCount: 1, seconds: 0.01)))
    #expect(RateLimiter(bytes: nil, operations: nil) == nil)
  }

  @Test func oneWakeUpServesManyRequests() throws {
    let start = MonotonicTime(nanoseconds: 5_000_000_000)
    let bucket = RateBucket(size: 1_000_000, refillTime: .milliseconds(1000))
    let limiter = try #require(RateLimiter(bytes: nil, operations: bucket, now: start))
    while limiter.isOpen { limiter.took(byteCount: 1) }
    let wait = limiter.wait(at: start.nanoseconds)
    #expect((900_000...1_100_000).contains(wait))
  }

  @Test func theSlowestRateIsWaitedFor() throws {
    let start = MonotonicTime(nanoseconds: 5_000_000_000)
    let bucket = RateBucket(size: 1, refillTime: .seconds(86_400))
    let limiter = try #require(RateLimiter(bytes: bucket, operations: nil, now: start))
    limiter.took(byteCount: 1 << 30)
    #expect(limiter.wait(at: start.nanoseconds) == 86_400_000_000_000)
    #expect(!limiter.isOpen)
  }
}

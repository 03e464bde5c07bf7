import Sandbox
import Testing

/// A BPF machine for the instructions the filters use: what the kernel would answer.
private func verdict(
  _ filter: SystemCallFilter, number: UInt32, arguments: [UInt64] = [], architecture: UInt32 = 0xC000_003E
) -> UInt32? {
  var data = [UInt32](repeating: 0, count: 16)
  data[0] = number
  data[1] = architecture
  for (index, argument) in arguments.enumerated() {
    data[4 + index * 2] = UInt32(truncatingIfNeeded: argument)
    data[5 + index * 2] = UInt32(truncatingIfNeeded: argument >> 32)
  }
  var accumulator: UInt32 = 0
  var counter = 0
  while counter < filter.instructions.count {
    let instruction = filter.instructions[counter]
    counter += 1
    switch instruction.code {
    case 0x20: accumulator = data[Int(instruction.value / 4)]
    case 0x54: accumulator &= instruction.value
    case 0x15: counter += Int(accumulator == instruction.value ? instruction.jumpTrue : instruction.jumpFalse)
    case 0x35: counter += Int(accumulator >= instruction.value ? instruction.jumpTrue : instruction.jumpFalse)
    case 0x05: counter += Int(instruction.value)
    case 0x06: return instruction.value
    default: return nil
    }
  }
  return nil
}

private let allow: UInt32 = 0x7FFF_0000
private let kill: UInt32 = 0x8000_0000

@Suite struct SystemCallFilterTests {
  private func filter(_ text: String) throws -> SystemCallFilter {
    SystemCallFilter(try SystemCallRule.parse(text), processID: 4242)
  }

  @Test func listedCallsPassAndAllOthersKill() throws {
    let filter = try filter("read # a\nwrite # b\nio_uring_enter # c")
    for number: UInt32 in 0..<600 {
      #expect(verdict(filter, number: number) == ([0, 1, 426].contains(number) ? allow : kill))
    }
  }

  @Test func otherArchitecturesAndTheX32InterfaceKill() throws {
    let filter = try filter("read # a\nwrite # b")
    #expect(verdict(filter, number: 0, architecture: 0x4000_0003) == kill)
    #expect(verdict(filter, number: 0x4000_0000) == kill)
    #expect(verdict(filter, number: 0x4000_0001) == kill)
  }

  @Test func argumentsAreComparedInAllTheirBits() throws {
    let filter = try filter("ioctl arg1 == 0xae80 # run\nioctl arg1 in 0x4040ae79, 0x4020ae76 # notify")
    for (value, expected): (UInt64, UInt32) in [
      (0xAE80, allow), (0x4040_AE79, allow), (0x4020_AE76, allow), (0xAE81, kill), (0x1_0000_AE80, kill), (0, kill),
    ] {
      #expect(verdict(filter, number: 16, arguments: [3, value]) == expected)
    }
  }

  @Test func aRefusedCallComesBackWhereNoRuleAllowsIt() throws {
    let filter = SystemCallFilter(
      try SystemCallRule.parse("socket arg0 == 1 # local\nread # a"), processID: 1, refused: [(41, 13), (2, 2), (0, 1)])
    let refused: UInt32 = 0x0005_0000
    #expect(verdict(filter, number: 41, arguments: [1]) == allow)
    #expect(verdict(filter, number: 41, arguments: [16]) == refused | 13)
    #expect(verdict(filter, number: 2) == refused | 2)
    #expect(verdict(filter, number: 0) == allow)
    #expect(verdict(filter, number: 3) == kill)
  }

  @Test func masksLookAtTheirBitsOnly() throws {
    let filter = try filter("mmap arg2 & 0x4 == 0 and arg3 & 0x20 == 0x20 # memory")
    #expect(verdict(filter, number: 9, arguments: [0, 4096, 3, 0x22]) == allow)
    #expect(verdict(filter, number: 9, arguments: [0, 4096, 7, 0x22]) == kill)
    #expect(verdict(filter, number: 9, arguments: [0, 4096, 3, 0x02]) == kill)
    #expect(verdict(filter, number: 9, arguments: [0, 4096, 3 | 1 << 40, 0x22]) == allow)
  }

  @Test func selfMeansTheProcessOnly() throws {
    let filter = try filter("tgkill arg0 == self # threads")
    #expect(verdict(filter, number: 234, arguments: [4242, 1, 6]) == allow)
    #expect(verdict(filter, number: 234, arguments: [4243, 1, 6]) == kill)
  }

  @Test func everyCombinationOfSetsIsAnAlternative() throws {
    let filter = try filter("prctl arg0 in 4, 15 and arg1 in 0, 7 # names")
    for a: UInt64 in [4, 15, 16] {
      for b: UInt64 in [0, 7, 8] {
        #expect(verdict(filter, number: 157, arguments: [a, b]) == (a != 16 && b != 8 ? allow : kill))
      }
    }
  }

  @Test(arguments: [
    "read", "read #", "reed # typo", "ioctl arg6 == 1 # no such argument", "ioctl arg1 = 1 # operator", "mmap arg2 & 0x4 == 0x8 # outside",
    "read # a\nread # again", "ioctl arg1 == 0xzz # number",
  ])
  func badLinesAreNamed(text: String) {
    #expect(throws: RuleError.self) { try SystemCallRule.parse(text) }
  }

  /// Seen when the fuzz target was written: so many conditions that a comparison could not jump over the rest of them, and sets whose combinations
  /// took all memory.
  @Test func rulesBeyondWhatAFilterCanHoldAreNamed() throws {
    let masks = (0..<44).map { "arg0 & 0x\(String(1 << UInt64($0), radix: 16)) == 0" }
    #expect(throws: RuleError.self) { try SystemCallRule.parse("read \(masks.joined(separator: " and ")) # bits") }
    let most = try filter("read \(masks.prefix(SystemCallRule.mostConditions).joined(separator: " and ")) # bits")
    #expect(verdict(most, number: 0, arguments: [1 << 20]) == allow)
    #expect(verdict(most, number: 0, arguments: [1 << 3]) == kill)
    let set = (0..<100).map(String.init).joined(separator: ", ")
    #expect(throws: RuleError.self) { try SystemCallRule.parse("read arg0 in \(set) and arg1 in \(set) and arg2 in \(set) # sets") }
    #expect(throws: RuleError.self) { try SystemCallRule.parse("read arg0 in \(set) and arg1 in 1, 2, 3, 4, 5, 6 # sets") }
    #expect(try SystemCallRule.parse("read arg0 in \(set) and arg1 in 1, 2, 3, 4, 5 # sets").count == 1)
  }

  @Test func namesAndNumbersAgree() {
    for (name, number): (String, UInt32) in [
      ("read", 0), ("ioctl", 16), ("execve", 59), ("openat", 257), ("rseq", 334), ("io_uring_setup", 425), ("clone3", 435),
      ("landlock_restrict_self", 446), ("mseal", 462),
    ] {
      #expect(SystemCall.number(name) == number)
      #expect(SystemCall.name(number) == name)
    }
    #expect(SystemCall.number("nothing") == nil)
    #expect(SystemCall.name(400) == "system call 400")
  }
}

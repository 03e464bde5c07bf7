// Rules compiled to a seccomp program (classic BPF, linux/filter.h, linux/seccomp.h).

/// A compiled filter: architecture first, then the x32 range, then one block per allowed call.
package struct SystemCallFilter: Equatable, Sendable {
  /// One `struct sock_filter`.
  package struct Instruction: Equatable, Sendable {
    package var code: UInt16
    package var jumpTrue: UInt8
    package var jumpFalse: UInt8
    package var value: UInt32
  }

  /// What happens to a call that no rule allows (SECCOMP_RET_...).
  package enum Refusal: UInt32, Sendable {
    case killProcess = 0x8000_0000
    /// The call is carried out and logged: to learn a list.
    case log = 0x7FFC_0000
  }

  package let instructions: [Instruction]

  private enum Code {
    static let loadWord: UInt16 = 0x20  // BPF_LD | BPF_W | BPF_ABS
    static let jumpEqual: UInt16 = 0x15  // BPF_JMP | BPF_JEQ | BPF_K
    static let jumpGreaterOrEqual: UInt16 = 0x35  // BPF_JMP | BPF_JGE | BPF_K
    static let jumpAlways: UInt16 = 0x05  // BPF_JMP | BPF_JA
    static let and: UInt16 = 0x54  // BPF_ALU | BPF_AND | BPF_K
    static let result: UInt16 = 0x06  // BPF_RET | BPF_K
  }

  private static let allow: UInt32 = 0x7FFF_0000
  private static let kill: UInt32 = 0x8000_0000
  /// SECCOMP_RET_ERRNO
  private static let errorReturn: UInt32 = 0x0005_0000
  /// AUDIT_ARCH_X86_64
  private static let architecture: UInt32 = 0xC000_003E
  /// Numbers from here on are the x32 interface.
  private static let x32: UInt32 = 0x4000_0000
  /// Offsets in struct seccomp_data.
  private static let numberOffset: UInt32 = 0
  private static let architectureOffset: UInt32 = 4
  private static let argumentsOffset: UInt32 = 16

  /// - Parameters:
  ///   - processID: what `self` means in the rules.
  ///   - refused: calls that come back with an error instead, unless a rule allows them.
  package init(
    _ rules: [SystemCallRule], refusal: Refusal = .killProcess, processID: Int32, refused: [(number: UInt32, errno: UInt16)] = []
  ) {
    var program: [Instruction] = []
    func load(_ offset: UInt32) -> Instruction { Instruction(code: Code.loadWord, jumpTrue: 0, jumpFalse: 0, value: offset) }
    func finish(_ action: UInt32) -> Instruction { Instruction(code: Code.result, jumpTrue: 0, jumpFalse: 0, value: action) }

    program.append(load(Self.architectureOffset))
    program.append(Instruction(code: Code.jumpEqual, jumpTrue: 1, jumpFalse: 0, value: Self.architecture))
    program.append(finish(Self.kill))
    program.append(load(Self.numberOffset))
    program.append(Instruction(code: Code.jumpGreaterOrEqual, jumpTrue: 0, jumpFalse: 1, value: Self.x32))
    program.append(finish(Self.kill))

    // The calls in the order of their first rule: the frequent ones stand first in the lists.
    var order: [UInt32] = []
    let refused = refused + rules.compactMap { rule in rule.failure.map { (rule.number, $0) } }
    let rules = rules.filter { $0.failure == nil }
    for rule in rules where !order.contains(rule.number) { order.append(rule.number) }
    for number in order {
      // With other arguments than those allowed: as the call is refused, where it is.
      let other = refused.first { $0.number == number }.map { Self.errorReturn | UInt32($0.errno) } ?? refusal.rawValue
      let block = Self.block(rules.filter { $0.number == number }, processID: processID, refusal: other)
      // Not this call: over the block. A conditional jump reaches 255 instructions, `ja` any.
      program.append(Instruction(code: Code.jumpEqual, jumpTrue: 1, jumpFalse: 0, value: number))
      program.append(Instruction(code: Code.jumpAlways, jumpTrue: 0, jumpFalse: 0, value: UInt32(block.count)))
      program += block
    }
    for (number, errno) in refused where !order.contains(number) {
      program.append(Instruction(code: Code.jumpEqual, jumpTrue: 0, jumpFalse: 1, value: number))
      program.append(finish(Self.errorReturn | UInt32(errno)))
    }
    program.append(finish(refusal.rawValue))
    instructions = program
  }

  /// Allows when the conditions of one rule hold, refuses otherwise; never falls out at the end.
  private static func block(_ rules: [SystemCallRule], processID: Int32, refusal: UInt32) -> [Instruction] {
    let allowed = Instruction(code: Code.result, jumpTrue: 0, jumpFalse: 0, value: allow)
    if rules.contains(where: \.conditions.isEmpty) { return [allowed] }
    var program: [Instruction] = []
    for rule in rules {
      // Sets of values become alternatives.
      for combination in combinations(rule.conditions, processID: processID) {
        var body: [Instruction] = []
        for (argument, mask, value) in combination { body += compare(argument, mask: mask, value: value) }
        // Each comparison jumps behind this alternative when it fails.
        let length = body.count + 1
        for index in body.indices where body[index].code == Code.jumpEqual {
          body[index].jumpFalse = UInt8(length - index - 1)
        }
        program += body
        program.append(allowed)
      }
    }
    program.append(Instruction(code: Code.result, jumpTrue: 0, jumpFalse: 0, value: refusal))
    return program
  }

  private static func combinations(
    _ conditions: [SystemCallRule.Condition], processID: Int32
  ) -> [[(argument: Int, mask: UInt64, value: UInt64)]] {
    var all: [[(argument: Int, mask: UInt64, value: UInt64)]] = [[]]
    for condition in conditions {
      let alternatives: [(UInt64, UInt64)] =
        switch condition.test {
        case .masked(let mask, let value): [(mask, value)]
        case .anyOf(let values): values.map { (.max, $0) }
        // A pid is an int: the kernel looks at the low half only, libc may leave anything above.
        case .ownProcess: [(0xFFFF_FFFF, UInt64(UInt32(bitPattern: processID)))]
        }
      all = all.flatMap { before in alternatives.map { before + [(condition.argument, $0.0, $0.1)] } }
    }
    return all
  }

  /// Both halves of a 64-bit argument against a masked value; a half whose mask is empty is not looked at.
  private static func compare(_ argument: Int, mask: UInt64, value: UInt64) -> [Instruction] {
    var program: [Instruction] = []
    for half in 0..<2 {
      let halfMask = UInt32(truncatingIfNeeded: mask >> (32 * UInt64(half)))
      if halfMask == 0 { continue }
      let offset = argumentsOffset + UInt32(argument) * 8 + UInt32(half) * 4
      program.append(Instruction(code: Code.loadWord, jumpTrue: 0, jumpFalse: 0, value: offset))
      if halfMask != .max { program.append(Instruction(code: Code.and, jumpTrue: 0, jumpFalse: 0, value: halfMask)) }
      let halfValue = UInt32(truncatingIfNeeded: value >> (32 * UInt64(half)))
      program.append(Instruction(code: Code.jumpEqual, jumpTrue: 0, jumpFalse: 0, value: halfValue))
    }
    return program
  }
}

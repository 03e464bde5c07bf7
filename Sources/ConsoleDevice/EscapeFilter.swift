/// Finds the escape key in what a person types. Ctrl-A is the key: Ctrl-A x ends the VM, Ctrl-A Ctrl-A types one
/// Ctrl-A; before any other key it is an ordinary key, and both reach the guest.
package struct EscapeFilter: Sendable {
  package static let key: UInt8 = 0x01

  private var isPending = false

  package init() {}

  /// What one typed byte comes to.
  package enum Outcome: Equatable, Sendable {
    case nothing
    case byte(UInt8)
    /// The escape key and the byte behind it, which did not belong together.
    case keyAnd(UInt8)
    /// End the VM.
    case quit
  }

  package mutating func filter(_ byte: UInt8) -> Outcome {
    guard isPending else {
      if byte == Self.key {
        isPending = true
        return .nothing
      }
      return .byte(byte)
    }
    isPending = false
    switch byte {
    case UInt8(ascii: "x"), UInt8(ascii: "X"): return .quit
    case Self.key: return .byte(Self.key)
    default: return .keyAnd(byte)
    }
  }
}

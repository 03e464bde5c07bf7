// VMMemory: guest physical addresses, the regions behind them, checked translation and copies. The only owner of guest
// pointers: others hold a `GuestAddress`, or a pointer lent by a checked translation for the length of one request.
//
// Guest memory changes at any moment under our eyes. So it is copied out first and looked at afterwards, field by field
// through single loads where it is looked at in place, and never twice.

/// A guest physical address, in bytes.
public struct GuestAddress: Hashable, Comparable, Sendable, CustomStringConvertible {
  public var rawValue: UInt64

  @inlinable public init(_ rawValue: UInt64) { self.rawValue = rawValue }

  @inlinable public static func < (a: GuestAddress, b: GuestAddress) -> Bool { a.rawValue < b.rawValue }

  /// The address `byteCount` further, or nil beyond the end of the address space.
  @inlinable public func advanced(by byteCount: UInt64) -> GuestAddress? {
    let (sum, overflow) = rawValue.addingReportingOverflow(byteCount)
    return overflow ? nil : GuestAddress(sum)
  }

  public var description: String { "0x" + String(rawValue, radix: 16) }
}

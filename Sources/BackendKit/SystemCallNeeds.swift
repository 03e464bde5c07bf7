import Sandbox

/// The system calls that a device makes once it is prepared, besides those that every back end makes. Any other call ends the
/// process.
public struct SystemCallNeeds: Sendable {
  package var rules: [SystemCallRule]

  /// None besides the common ones.
  public static let none = SystemCallNeeds([])

  package init(_ lists: [SystemCallList]) { rules = lists.flatMap(\.rules) }

  /// One call a line, with its arguments and a reason, as `protocol/system-calls/README.md` describes:
  ///
  ///     ioctl    arg1 == 0x400454d0        # TUNSETOFFLOAD: features change after a reset
  public init(_ text: String) throws(BackendError) {
    do { rules = try SystemCallRule.parse(text) } catch { throw .device("\(error)") }
  }
}

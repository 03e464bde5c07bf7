/// The exit codes of `martlet run`.
package struct ExitCode: RawRepresentable, Hashable, Sendable {
  package let rawValue: Int32
  package init(rawValue: Int32) { self.rawValue = rawValue }

  /// The guest powered off, reset under `--no-reboot`, or was shut down by `martlet ctl shutdown`.
  package static let success = ExitCode(rawValue: 0)
  /// A defect of Martlet.
  package static let defect = ExitCode(rawValue: 1)
  /// The command line is wrong.
  package static let usage = ExitCode(rawValue: 2)
  /// Something named on the command line cannot be used: a file, a tap, a socket.
  package static let resource = ExitCode(rawValue: 3)
  /// This host cannot run the VM: no /dev/kvm, no permission for it, not enough memory, a program is missing.
  package static let host = ExitCode(rawValue: 4)
  /// A back end did not come up: it refused, broke the protocol or did not answer in time.
  package static let device = ExitCode(rawValue: 5)
  /// The core process died, and the VM with it.
  package static let coreLost = ExitCode(rawValue: 6)
  /// The guest crashed: it cannot run any more.
  package static let guestCrashed = ExitCode(rawValue: 7)

  /// Ended by a signal, as shells count it: 130 by SIGINT, 143 by SIGTERM, 129 by SIGHUP.
  package static func signal(_ number: Int32) -> ExitCode { ExitCode(rawValue: 128 + number) }

  /// For `--help`.
  package static let table: [(code: Int32, meaning: String)] = [
    (0, "the guest powered off, or the VM was shut down by order"),
    (1, "a defect of Martlet"),
    (2, "the command line is wrong"),
    (3, "a file, tap or socket named there cannot be used"),
    (4, "this host cannot run the VM"),
    (5, "a device process or back end did not come up"),
    (6, "the core process died"),
    (7, "the guest crashed"),
    (128, "plus N: ended by signal N"),
  ]
}

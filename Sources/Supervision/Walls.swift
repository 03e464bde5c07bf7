import ControlProtocol
import HostSystem
import Sandbox

/// How this VM's processes are walled in: what was asked for and what the host has. What it lacks is said here, once.
struct Walls: ~Copyable {
  let mode: WallMode
  let namespaces: Namespaces
  private let log: KernelLog?

  init(_ configuration: VMConfiguration, _ identities: Identities) throws(SupervisionError) {
    switch configuration.sandbox {
    case .off:
      Log.warning("The sandbox is OFF: nothing but ids and capabilities separates this VM's processes from the host")
      mode = .off
    case .log:
      Log.warning("The sandbox only logs: calls outside a process's list are carried out and written to the kernel's log")
      mode = .log
    case .on: mode = .on
    case nil: mode = configuration.isHardened ? .on : Self.standard
    }
    guard mode != .off else {
      namespaces = []
      log = nil
      return
    }
    let host = HostWalls.probe(identity: identities.example)
    if configuration.isHardened, !host.lacks.isEmpty { throw .notHardened(lacks: host.lacks) }
    for lack in host.lacks { Log.warning("Sandbox: \(lack)") }
    namespaces = host.namespaces
    log = KernelLog()
  }

  /// Those that stand already.
  init(mode: WallMode, namespaces: Namespaces, log: consuming OwnedFD?) {
    self.mode = mode
    self.namespaces = namespaces
    switch consume log {
    case .some(let fd): self.log = KernelLog(adopting: fd)
    case .none: self.log = nil
    }
  }

  /// The kernel's log.
  var logNumber: CInt? {
    switch log {
    case .some(let log): log.fd.rawValue
    case .none: nil
    }
  }

  /// The call that this process was killed for by its filter, where that can be known.
  borrowing func callThatKilled(_ processID: Int32) -> String? {
    switch log {
    case .some(let log): log.callThatKilled(processID).map(SystemCall.name)
    case .none: nil
    }
  }

  /// Without an option.
  static let standard = WallMode.on

  /// What a program is told.
  var arguments: [String] { mode == .off ? [] : ["--sandbox=\(mode.rawValue)"] }

  /// The line about a process that was killed by its filter.
  borrowing func violation(_ process: VMProcess) -> String {
    let who = "audit: sandbox violation: \(process.program) of \(process.id) (pid \(process.processID)) was killed "
    let call =
      switch log {
      case .some(let log): log.callThatKilled(process.processID)
      case .none: UInt32?.none
      }
    guard let call else {
      return who + "for a system call outside its list; the kernel's audit record of it cannot be read (dmesg, type=1326)"
    }
    return who + "for calling \(SystemCall.name(call)) (\(call)), which its list does not allow, or not with these arguments"
  }
}

import BackendKit
import CLinux
import Glibc
import HostSystem

/// `martlet-console`.
package enum ConsoleProgram {
  package static var program: BackendProgram {
    BackendProgram(
      type: "console",
      options: [
        .value("stream-fd", "NUMBER", "carry the bytes of this inherited stream socket (a serial port); no vhost-user"),
        .flag("tty", "standard input and output: raw mode, Ctrl-A x ends the VM, Ctrl-A Ctrl-A types Ctrl-A"),
        .value("tty-in-fd", "NUMBER", "inherited terminal (or pipe) to read from; with --tty-out-fd"),
        .value("tty-out-fd", "NUMBER", "inherited terminal (or pipe) to write to"),
        .flag("pty", "make a pseudo-terminal and print its path on standard output"),
        .value("pty-fd", "NUMBER", "inherited master side of a pseudo-terminal"),
        .value("file", "PATH", "append output to this file; no input"),
        .value("file-fd", "NUMBER", "append output to this inherited file; no input"),
        .value("listen", "PATH", "listen on this Unix socket for one client at a time"),
        .value("listen-fd", "NUMBER", "use this inherited listening socket"),
        .flag("null", "drop output; no input"),
        .value("control-fd", "NUMBER", "report the escape key to the supervisor on this inherited socket"),
      ])
  }

  /// Runs the program; returns its exit code.
  package static func run(_ arguments: [String]) -> CInt {
    program.run(arguments, alternative: "stream-fd") { launch throws(BackendError) in
      let sink = try sink(launch)
      let control = try control(launch)
      do throws(SystemError) {
        return try VirtioConsole.make(port: ConsolePort(sink), control: control)
      } catch { throw .system(error) }
    } work: { launch, signals, announce throws(BackendError) in
      guard let number = try launch.descriptor("stream-fd") else { throw .noConnection }
      let sink = try sink(launch)
      let control = try control(launch)
      let carrier: SerialCarrier
      do throws(SystemError) {
        carrier = try SerialCarrier.make(
          stream: OwnedFD.inherited(number), port: ConsolePort(sink), signals: signals, control: control)
      } catch { throw .system(error) }
      try announce(SystemCallNeeds([.console]))
      do throws(SystemError) { _ = try carrier.run() } catch { throw .system(error) }
      return 0
    }
  }

  private static func control(_ launch: LaunchArguments) throws(BackendError) -> ControlLine? {
    guard let number = try launch.descriptor("control-fd") else { return nil }
    do { return ControlLine(try OwnedFD.inherited(number)) } catch { throw .system(error) }
  }

  private static func sink(_ launch: LaunchArguments) throws(BackendError) -> ConsoleSink {
    let names = ["tty", "tty-in-fd", "pty", "pty-fd", "file", "file-fd", "listen", "listen-fd", "null"]
    let given = names.filter { launch.has($0) }
    guard given.count == 1, launch.has("tty-in-fd") == launch.has("tty-out-fd") else {
      throw .device(
        "Exactly one of --tty, --tty-in-fd with --tty-out-fd, --pty, --pty-fd, --file, --file-fd, --listen, --listen-fd and "
          + "--null is needed")
    }
    let first = given[0].hasSuffix("-fd") ? try launch.descriptor(given[0]) : nil
    let second = try launch.descriptor("tty-out-fd")
    do throws(SystemError) {
      switch given[0] {
      case "tty":
        // Copies: 0, 1 and 2 stay what they are, so that no other descriptor gets their numbers.
        return try .terminal(input: copy(of: 0), output: copy(of: 1))
      case "tty-in-fd": return try terminal(first ?? -1, second ?? -1)
      case "pty":
        let pty = try PseudoTerminal.make()
        announce(pty.path)
        return try .pseudoTerminal(pty.takeMaster())
      case "pty-fd": return try .pseudoTerminal(OwnedFD.inherited(first ?? -1))
      case "file": return try .appending(OwnedFD.open(launch.value("file") ?? "", O_WRONLY | O_CREAT | O_APPEND))
      case "file-fd": return try .appending(OwnedFD.inherited(first ?? -1))
      case "listen":
        let path = launch.value("listen") ?? ""
        return try .socket(UnixSocket.listen(at: path), path: path)
      case "listen-fd": return try .socket(OwnedFD.inherited(first ?? -1))
      default: return .null()
      }
    } catch { throw .system(error) }
  }

  private static func copy(of number: CInt) throws(SystemError) -> OwnedFD {
    let result = clinux_fcntl(number, F_DUPFD_CLOEXEC, 3)
    if result < 0 { throw SystemError("use descriptor \(number)", Errno(-result)) }
    return OwnedFD(owning: result)
  }

  /// One number may be given for both directions; the sink wants two descriptors.
  private static func terminal(_ input: CInt, _ output: CInt) throws(SystemError) -> ConsoleSink {
    let first = try OwnedFD.inherited(input)
    let second = input == output ? try first.duplicate() : try OwnedFD.inherited(output)
    return try .terminal(input: first, output: second)
  }

  private static func announce(_ path: String) {
    let output = OwnedFD(owning: 1)
    try? output.writeAll(Array("Console: \(path)\n".utf8))
    _ = output.release()
  }
}

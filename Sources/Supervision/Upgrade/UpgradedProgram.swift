import CLinux
import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// The program `martlet-supervisor` where it does not start a VM but takes part in an upgrade of one that runs.
enum UpgradedProgram {
  enum Role: String {
    /// Reads a state (descriptor 3), says on descriptor 1 whether it could take over, and ends.
    case examine
    /// Takes over: the process is the VM's supervisor already.
    case takeOver = "take-over"
    /// The process is a VM's keeper already, which has no supervisor: its state and the supervisor's are descriptors that arguments name.
    case keep
    /// Takes the spawner's place: its line is descriptor 3, its state 4, the programs' directory 5, /dev/null 6.
    case spawner

    private static let option = "--martlet-upgrade="

    var argument: String { Self.option + rawValue }

    init?(argument: String) {
      guard argument.hasPrefix(Self.option) else { return nil }
      self.init(rawValue: String(argument.dropFirst(Self.option.count)))
    }
  }

  /// What the examined program says when it can take over; anything else is the sentence why not.
  static let acceptance = "state accepted\n"

  static func main(_ role: Role, _ arguments: [String]) -> ExitCode {
    do throws(SupervisionError) {
      switch role {
      case .examine: return try examine()
      case .takeOver: return try takeOver(arguments)
      case .keep: return try keep(arguments)
      case .spawner: try serve(arguments)
      }
    } catch {
      Log.error("After the upgrade: \(error.message ?? "it failed"); the VM has ended")
      return .defect
    }
  }

  private static func examine() throws(SupervisionError) -> ExitCode {
    let answer = try adopt(1)
    var text = acceptance
    do throws(StateError) {
      _ = try SupervisorState.decode(try read(3, limit: SupervisorState.limit)).check()
    } catch { text = error.message + "\n" }
    do { try answer.writeAll(Array(text.utf8)) } catch { throw .system(error) }
    return text == acceptance ? .success : .defect
  }

  private static func takeOver(_ arguments: [String]) throws(SupervisionError) -> ExitCode {
    // PR_SET_DUMPABLE: exec has set it anew.
    _ = clinux_prctl(4, 0, 0, 0, 0)
    func number(_ name: String) throws(SupervisionError) -> CInt { try Self.number(name, arguments) }
    let file = try number("state")
    let state: SupervisorState
    let configuration: VMConfiguration
    do throws(StateError) {
      state = try SupervisorState.decode(try read(file, limit: SupervisorState.limit))
      configuration = try state.check()
    } catch { throw .launch(error.message) }
    let spawner = Spawner(
      try adopt(number("line")), ProcessHandle(processID: try number("spawner-pid"), adopting: try adopt(number("spawner"))))
    collect(try adopt(number("predecessor")))
    ProcessWalls.setTitle("vm/\(configuration.name)/supervisor")
    Log.setSpeaker("martlet")
    let supervisor = try Supervisor(resuming: state, configuration, spawner)
    supervisor.finishUpgrade(state)
    return supervisor.run()
  }

  private static func keep(_ arguments: [String]) throws(SupervisionError) -> ExitCode {
    let own = try number("keeper", arguments)
    let theirs = try number("state", arguments)
    let known: KeeperState
    let state: [UInt8]
    do throws(StateError) {
      known = try KeeperState.decode(try read(own, limit: KeeperState.limit))
      state = try read(theirs, limit: SupervisorState.limit)
    } catch { throw .launch(error.message) }
    return try Keeper.resume(known, state)
  }

  private static func number(_ name: String, _ arguments: [String]) throws(SupervisionError) -> CInt {
    let word = arguments.first { $0.hasPrefix("--\(name)=") }.flatMap { CInt($0.dropFirst(name.utf8.count + 3)) }
    guard let word, word > 0 else { throw .launch("The argument --\(name)= is missing") }
    return word
  }

  /// The spawner before: its line ended with exec, and it with that.
  private static func collect(_ pidfd: consuming OwnedFD) {
    let process = ProcessHandle(processID: 0, adopting: pidfd)
    process.signal(SIGKILL)
    _ = process.waitForEnd()
  }

  /// Does not return.
  private static func serve(_ arguments: [String]) throws(SupervisionError) -> Never {
    Signals.blockAll()
    let line = try adopt(3)
    do throws(SupervisionError) {
      let state: SpawnerState
      do throws(StateError) { state = try SpawnerState.decode(try read(4, limit: SpawnerState.limit)) } catch {
        throw .launch(error.message)
      }
      let supervisor = try Supervisor(spawning: state, programs: try adopt(5))
      let null = try adopt(6)
      try? ProcessWalls.raise(title: "vm/\(supervisor.configuration.name)/spawner")
      _ = UnixSocket.send(line, [1], descriptors: [])
      Spawner.serve(line, null: null, supervisor)
    } catch {
      _ = UnixSocket.send(line, [0] + Array((error.message ?? "it failed").utf8.prefix(2048)), descriptors: [])
    }
    _exit(1)
  }

  /// A descriptor that came through exec.
  static func adopt(_ number: CInt) throws(SupervisionError) -> OwnedFD {
    let result = clinux_fcntl(number, F_SETFD, CLong(FD_CLOEXEC))
    guard result >= 0 else { throw .system(SystemError("take descriptor \(number) over", Errno(-result))) }
    return OwnedFD(owning: number)
  }

  /// The whole of a state, and its descriptor closed.
  private static func read(_ number: CInt, limit: Int) throws(StateError) -> [UInt8] {
    do {
      let file = try adopt(number)
      return try file.readToEnd(limit: limit + 1)
    } catch { throw .broken(.truncated) }
  }
}

import ControlProtocol
import HostSystem
import Sandbox

extension Supervisor {
  /// The whole program: the arguments of `martlet run` in, the exit code out.
  package static func main(_ arguments: [String]) -> ExitCode {
    Log.setSpeaker("martlet")
    if let role = arguments.first.flatMap(UpgradedProgram.Role.init(argument:)) {
      return UpgradedProgram.main(role, Array(arguments.dropFirst()))
    }
    let configuration: VMConfiguration
    do throws(ConfigurationError) { configuration = try VMConfiguration(arguments: arguments) } catch {
      Log.error(error.message)
      return .usage
    }
    // Descriptors inherited from an unknown parent stay open here: some parents notice our end by one. No process of the
    // VM gets them.
    ProcessWalls.setTitle("vm/\(configuration.name)/supervisor")
    Log.setSpeaker("martlet")
    do throws(SupervisionError) {
      let supervisor = try Supervisor(configuration)
      supervisor.upgrade.arguments = arguments
      if configuration.outlivesSupervisor { return try Keeper.run(supervisor) }
      return supervisor.run()
    } catch {
      if let message = error.message { Log.error(message) }
      return error.exitCode
    }
  }
}

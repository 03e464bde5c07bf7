import CLinux
import HostSystem

/// The signal that makes a processor leave the guest.
package enum Kick {
  /// A real-time signal; block it in every thread but those that run processors.
  package static var signal: CInt { clinux_kick_signal() }

  /// Installs the empty handler for the whole process. Without it the signal would end the process.
  package static func installHandler() throws(KVMError) {
    try require(clinux_install_kick_handler(signal), .signal)
  }
}

import ControlProtocol
import FrontEnd
import HostSystem
import Machine
import Sandbox
import VirtioTransport

/// The core: control channel, VM and devices on one event loop.
final class Core {
  enum Token {
    case control
    case machine
    case serial
    case deadline
    /// By the device's key.
    case device(Int)
    case deviceChannel(Int)
  }

  var loop: EventLoop<Token>
  var channel: ControlChannel
  let timer: Timer
  private var armedDeadline: MonotonicTime?
  var configuration: CoreConfiguration?
  var guest: GuestMachine?
  var devices: [CoreDevice] = []
  var nextKey = 0
  let serial = SerialCarrier()
  private var watchedSerial: Readiness?
  /// Watched, whatever the carrier's descriptor is by now.
  private var watchedSerialNumber: CInt?

  var state = VMInformation.State.created
  var resetCount: UInt32 = 0
  var startTime: MonotonicTime?
  /// The request to start, until the guest runs with all its devices.
  var pendingStart: UInt32?
  /// How many devices it has then; nil before the request.
  var deviceCount: Int?
  /// Requests to be answered when the reset under way is done.
  var pendingReboots: [UInt32] = []
  /// The paravirtual clock at the pause; it goes on from there.
  var pausedClock: UInt64?
  /// The state to return to after a reset.
  var exitCode: Int32?
  /// When to look at the rings again; nil while nothing waits in them, as far as is known.
  var nextLook: MonotonicTime?
  /// Devices are being stopped for the end, until then.
  var endDeadline: MonotonicTime?
  var endSequence: UInt32?

  let walls: WallMode

  init(_ socket: consuming OwnedFD, _ walls: WallMode = .off) throws(SystemError) {
    self.walls = walls
    loop = try EventLoop()
    timer = try Timer()
    channel = ControlChannel(socket)
    try loop.add(channel.socket, for: .readable, token: .control)
    try loop.add(timer.fd, for: .readable, token: .deadline)
  }

  // MARK: the loop

  func run() -> Int32 {
    while exitCode == nil {
      armTimer()
      let events: [(token: Token, readiness: Readiness)]
      do {
        events = try loop.wait()
      } catch {
        Log.error(error.description)
        exitCode = 1
        break
      }
      for event in events where exitCode == nil { handle(event.token, event.readiness) }
      afterEvents()
    }
    guest?.machine.end()
    return exitCode ?? 1
  }

  private func handle(_ token: Token, _ readiness: Readiness) {
    switch token {
    case .control: receiveControl()
    case .machine:
      guest?.machine.wakeUp.drainAfterReport()
      if let machine = guest?.machine { serial.refresh(machine) }
      sendSerial()
      takeMachineEvents()
    case .serial:
      sendSerial()
      guard let machine = guest?.machine else { break }
      // An end is reported for as long as it is not acted on, even while nothing is awaited.
      let isOver = !readiness.isDisjoint(with: [.hangUp, .error]) && !serial.awaitsReading
      if isOver || !serial.receive(into: machine) { closeSerial() }
    case .deadline:
      timer.acknowledge()
      armedDeadline = nil
      let now = MonotonicTime.now
      for device in devices where device.frontEnd.deadline.map({ $0 <= now }) ?? false {
        device.frontEnd.handleTimeout(now: now)
      }
      if let time = nextLook, time <= now { lookAtQueues(now) }
      if let endDeadline, endDeadline <= now { finishEnd() }
    case .device(let key), .deviceChannel(let key):
      devices.first { $0.key == key }?.frontEnd.receive(now: .now)
    }
  }

  /// What any event may have made possible.
  private func afterEvents() {
    guard exitCode == nil else { return }
    takeDeviceEvents()
    tryStart()
    tryPlug()
    tryFinishReset()
    finishLeaving()
    reportDevices()
    watchSerial()
    if endDeadline != nil, devices.allSatisfy({ [.paused, .lost].contains($0.frontEnd.state) }) { finishEnd() }
  }

  private func armTimer() {
    var deadline = endDeadline
    if let nextLook { deadline = min(deadline ?? nextLook, nextLook) }
    for device in devices {
      if let other = device.frontEnd.deadline { deadline = min(deadline ?? other, other) }
    }
    guard deadline != armedDeadline else { return }
    armedDeadline = deadline
    timer.set(deadline)
  }

  // MARK: the control channel

  private func receiveControl() {
    // Bounded by what lies in the socket; one event handles what is there.
    while exitCode == nil {
      do {
        switch try channel.receive() {
        case .nothing: return
        case .end:
          // An order to exit (protocol/launch.md).
          exitCode = 0
        case .message(var received):
          handle(received.message, received.sequence, &received.descriptors)
        }
      } catch {
        Log.error(error.description)
        exitCode = 1
      }
    }
  }

  func answer(_ message: CoreMessage, _ sequence: UInt32) {
    channel.send(message, sequence: sequence)
  }

  /// The VM cannot go on: says why and ends.
  func fail(_ error: CoreError, sequence: UInt32 = 0) {
    channel.send(.failed(error.kind, error.sentence), sequence: sequence)
    exitCode = 1
  }

  // MARK: the serial port

  private func sendSerial() {
    guard let machine = guest?.machine else { return }
    if !serial.send(from: machine) { closeSerial() }
  }

  private func closeSerial() {
    if let number = watchedSerialNumber { loop.remove(number: number) }
    watchedSerialNumber = nil
    watchedSerial = nil
    serial.close()
  }

  private func watchSerial() {
    guard let number = serial.number else { return }
    let interest = serial.interest
    guard interest != watchedSerial else { return }
    do {
      if watchedSerialNumber == nil {
        try loop.add(number: number, for: interest, token: .serial)
        watchedSerialNumber = number
      } else {
        try loop.modify(number: number, for: interest)
      }
      watchedSerial = interest
    } catch {
      Log.warning("Serial port: \(error.description)")
      closeSerial()
    }
  }
}

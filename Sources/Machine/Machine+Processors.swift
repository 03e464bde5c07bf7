import Boot
import HostSystem
import KVM

extension Machine {
  /// Starts the processors' threads, which set their processors up (so that loading the payload can go on meanwhile) and
  /// wait. Call `waitUntilReady` before anything else is asked of them.
  /// - Parameter closing: what each thread gives up before it first runs a guest; called on it.
  package func startProcessors(
    closing: @escaping @Sendable () throws(SystemError) -> Void = {}
  ) throws(MachineError) {
    let cpuid = boot.preparedCPUID(tscFrequency: processors[0].vcpu.tscFrequency())
    for processor in processors {
      do {
        processor.thread = try HostThread.start(name: "vcpu\(processor.id)") { [self] in
          processorThread(processor, cpuid, closing)
        }
      } catch {
        // Those that run already end, so that nobody waits for the ones that never came.
        control.set(.end)
        throw .system(error)
      }
    }
  }

  /// Waits until every processor is set up and parked.
  package func waitUntilReady() throws(MachineError) {
    if let failure = control.waitUntilParked() { throw failure }
  }

  /// Puts the boot processor at the entry point. Only while all processors are paused.
  package func enter(_ entry: EntryState) throws(MachineError) {
    do { try processors[0].vcpu.enter(entry) } catch { throw .kvm(error) }
  }

  /// Shuts the PCI bus: a processor that looks at its configuration space waits until `openBus`, or sees nothing there if
  /// the guest is stopped before that. For devices that come up beside the guest.
  package func shutBus() { control.setBus(open: false) }

  /// Everything is plugged in; processors that wait go on.
  package func openBus() { control.setBus(open: true) }

  /// Lets the guest run. After a pause that the guest should know of, `announcePause()` comes first.
  package func resume() { control.set(.run) }

  /// Stops all processors with their last access completed, and waits for that; bounded by the length of one access.
  package func pause() {
    requestPause()
    _ = control.waitUntilParked()
  }

  /// Tells all processors to stop, without waiting.
  func requestPause() {
    guard control.command == .run else { return }
    control.set(.pause)
    for processor in processors { processor.kick() }
  }

  /// Tells the guest's watchdogs about a pause. Only while all processors are paused.
  package func announcePause() {
    for processor in processors { processor.vcpu.announcePause() }
  }

  /// Ends all processors' threads; the machine cannot run again.
  package func end() {
    control.set(.end)
    for processor in processors { processor.kick() }
    for processor in processors {
      processor.thread?.join()
      processor.thread = nil
    }
  }

  /// Puts all processors back to their state before the first run. Only while all are paused.
  package func resetProcessors() throws(MachineError) {
    guard let first = processors[0].initialState else { return }
    do {
      for processor in processors {
        switch processor.id {
        case 0: try processor.vcpu.restoreState(first)
        case 1: try processor.vcpu.restoreState(processor.initialState ?? first)
        default:
          if let template = processors[1].initialState {
            try processor.vcpu.restoreState(template.asProcessor(id: processor.id))
          }
        }
        try processor.vcpu.renewTimeStampCounter()
      }
    } catch {
      throw .kvm(error)
    }
  }

  // MARK: threads

  private func processorThread(
    _ processor: Processor, _ cpuid: CPUIDTable, _ closing: () throws(SystemError) -> Void
  ) {
    Signals.unblock(Kick.signal)
    do {
      try processor.setUp(boot, cpuid)
    } catch {
      control.reportFailure(.kvm(error))
    }
    do {
      try closing()
    } catch {
      control.reportFailure(.system(error))
    }
    runLoop(processor)
    control.reportEnd()
  }

  private func runLoop(_ processor: Processor) {
    // An access that the kernel completes only on the next entry.
    var hasPendingAccess = false
    while true {
      switch control.command {
      case .run: break
      case .end: return
      case .pause:
        if hasPendingAccess {
          processor.vcpu.completePendingAccess()
          hasPendingAccess = false
        }
        control.park()
        continue
      }
      hasPendingAccess = false
      switch processor.vcpu.run() {
      case .port(let access):
        hasPendingAccess = true
        handle(access, processor)
      case .memory(let access):
        hasPendingAccess = true
        handle(access, processor)
      case .endOfInterrupt(let vector):
        deviceLock.withLock {
          var effects: [IOAPIC.Effect] = []
          devices.ioapic.endOfInterrupt(vector: vector, effects: &effects)
          devices.apply(effects, self)
        }
      case .interrupted:
        // Cleared before the command is looked at: a later request sets it again.
        processor.vcpu.clearExitRequest()
      case .again: break
      case .tripleFault: requestReset()
      case .systemEvent(let type):
        switch type {
        case 1: requestPowerOff()
        case 2: requestReset()
        default: crash(processor, "system event \(type)")
        }
      case .halted: crash(processor, "a halt that KVM did not wait in")
      case .failedEntry(let reason): crash(processor, "failed entry, hardware reason 0x\(String(reason, radix: 16))")
      case .internalError(let suberror, let data):
        let words = data.map { "0x" + String($0, radix: 16) }.joined(separator: " ")
        crash(processor, "KVM internal error \(suberror) (\(words))")
      case .unknown(let reason): crash(processor, "unknown exit \(reason)")
      case .failed(let errno): crash(processor, "KVM_RUN failed: \(errno.explanation)")
      }
    }
  }

  private func handle(_ access: PortAccess, _ processor: Processor) {
    if !control.busIsOpen, Devices.pciDataPorts.contains(access.port) { control.waitForBus() }
    var request = Platform.Request.none
    deviceLock.withLock {
      devices.portAccesses += 1
      // The kernel's buffer bounds the count: one page.
      for index in 0..<access.count {
        if access.isWrite {
          let outcome = devices.writePort(
            access.port, width: access.width, value: processor.vcpu.portData(access, index), self)
          if outcome != .none { request = outcome }
        } else {
          processor.vcpu.setPortData(access, index, devices.readPort(access.port, width: access.width, self))
        }
      }
    }
    switch request {
    case .none: break
    case .reset: requestReset()
    case .powerOff: requestPowerOff()
    }
  }

  private func handle(_ access: MemoryAccess, _ processor: Processor) {
    if !control.busIsOpen, PhysicalMap.ecam.contains(access.address) { control.waitForBus() }
    deviceLock.withLock {
      devices.memoryAccesses += 1
      if access.isWrite {
        devices.writeMemory(access.address, width: access.byteCount, value: access.value, self)
      } else {
        processor.vcpu.setMemoryData(devices.readMemory(access.address, width: access.byteCount, self))
      }
    }
  }

  // MARK: ends

  private func requestReset() {
    requestPause()
    post(.resetRequested)
  }

  private func requestPowerOff() {
    requestPause()
    post(.powerOff)
  }

  private func crash(_ processor: Processor, _ reason: String) {
    var place = ""
    if let registers = try? processor.vcpu.registers(), let special = try? processor.vcpu.specialRegisters() {
      func hex(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
      place =
        " at rip \(hex(registers.rip)), rsp \(hex(registers.rsp)), cs \(hex(UInt64(special.cs.selector))), "
        + "cr0 \(hex(special.cr0)), cr2 \(hex(special.cr2)), cr3 \(hex(special.cr3)), cr4 \(hex(special.cr4)), "
        + "efer \(hex(special.efer)), rflags \(hex(registers.rflags))"
    }
    requestPause()
    post(.crashed("Processor \(processor.id): \(reason)\(place)"))
  }
}
